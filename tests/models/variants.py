"""Tiny checkpoints of every family and config variant, written by transformers itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 199
SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


def rope(kind: str, **parameters: float | bool) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **parameters}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
WINDOWS = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

BY_TYPE = {
    "full_attention": rope("linear", factor=2.0),
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
ALTERNATING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 24,
}
GEMMA2 = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24}
GEMMA3 = {**GEMMA2, **ALTERNATING, "rope_parameters": BY_TYPE}
LONGROPE = {  # 12 of a head's 16 dimensions rotate
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1, 2.9],
    "long_factor": [1.2, 1.9, 3.1, 4.7, 8.3, 14.1],
}
PAD = {"pad_token_id": 0}  # the default is beyond so small a vocabulary
MINISTRAL3 = {
    "head_dim": 24,
    "rope_parameters": rope(
        "yarn", factor=8.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.4
    ),
}
Config = Callable[..., transformers.PreTrainedConfig]


def multimodal(
    config: Config, text: type[transformers.PreTrainedConfig], vision: Mapping[str, Any]
) -> Config:
    """What makes a multimodal config from the text model's fields."""

    def make(**fields: Any) -> transformers.PreTrainedConfig:
        return config(
            text_config=text(**fields).to_dict(),
            vision_config=dict(vision),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
        )

    return make


VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 4}
LOGITS_ONLY = {
    "gemma2-untied-bias", "gemma3", "gemma3-untied-pattern", "olmo2-mha-tied", "phi3-partial-tied",
    "phi3-longrope-short", "granite-bias", "smollm3", "ministral3", "mistral-multimodal",
}  # fmt: skip
"""Variants whose family is also there with all that a schedule could touch: one pass suffices for these."""
VARIANTS: Mapping[str, tuple[Config, Mapping[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-mha-tied": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama-attention-bias": (transformers.LlamaConfig, {"attention_bias": True}),
    "llama-mlp-bias": (transformers.LlamaConfig, {"mlp_bias": True}),
    "llama-head-dim": (transformers.LlamaConfig, {"head_dim": 24}),
    "llama-linear": (transformers.LlamaConfig, {"rope_parameters": rope("linear", factor=4.0)}),
    "llama-dynamic": (transformers.LlamaConfig, {"rope_parameters": rope("dynamic", factor=2.0)}),
    "llama-llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-yarn": (transformers.LlamaConfig, {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                **YARN,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
                "beta_fast": 16.0,
            }
        },
    ),
    "llama-yarn-factor": (
        transformers.LlamaConfig,
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 24, "head_dim": 32}),
    "mistral-full": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-windows": (transformers.Qwen2Config, WINDOWS),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "qwen3-windows-bias": (
        transformers.Qwen3Config,
        {**WINDOWS, "head_dim": 16, "attention_bias": True},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {**GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-untied-bias": (
        transformers.Gemma2Config,
        {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma3-untied-pattern": (
        transformers.Gemma3TextConfig,
        {**GEMMA2, "sliding_window_pattern": 2, "tie_word_embeddings": False},
    ),
    "gemma3-multimodal": (
        multimodal(
            transformers.Gemma3Config,
            transformers.Gemma3TextConfig,
            {**VISION, "model_type": "siglip_vision_model"},
        ),
        {**GEMMA3, "tie_word_embeddings": True},
    ),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo2-mha-tied": (
        transformers.Olmo2Config,
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "olmo3": (
        transformers.Olmo3Config,
        {**ALTERNATING, "rope_parameters": {**BY_TYPE, "full_attention": YARN}},
    ),
    "phi3": (transformers.Phi3Config, {**PAD, "sliding_window": 24}),
    "phi3-partial-tied": (
        transformers.Phi3Config,
        {
            **PAD,
            "rope_parameters": rope("default", partial_rotary_factor=0.5),
            "tie_word_embeddings": True,
        },
    ),
    "phi3-longrope-short": (
        transformers.Phi3Config,
        {
            **PAD,
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
        },
    ),
    "phi3-longrope-long": (
        transformers.Phi3Config,
        {
            **PAD,
            "rope_parameters": {**LONGROPE, "attention_factor": 1.2},
            "original_max_position_embeddings": 3,  # less than every prompt that transformers continues
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            "attention_multiplier": 0.11,
            "embedding_multiplier": 6.3,
            "residual_multiplier": 0.37,
            "logits_scaling": 1.7,
            "tie_word_embeddings": True,
        },
    ),
    "granite-bias": (
        transformers.GraniteConfig,
        {"attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], **PAD},
    ),
    "smollm3-windows-untied": (
        transformers.SmolLM3Config,
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 24,
            "tie_word_embeddings": False,
            **PAD,
        },
    ),
    "ministral3": (transformers.Ministral3Config, MINISTRAL3),
    "mistral-multimodal": (
        multimodal(transformers.Mistral3Config, transformers.MistralConfig, PIXTRAL),
        {"head_dim": 24, "sliding_window": None},
    ),
    "ministral3-multimodal-tied": (
        multimodal(
            transformers.Mistral3Config,
            transformers.Ministral3Config,
            PIXTRAL,
        ),
        {**MINISTRAL3, "tie_word_embeddings": True},
    ),
}


def build_reference(
    name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> transformers.PreTrainedModel:
    """The variant's transformers model with eager attention and random weights, biases and norms included.

    transformers starts biases at zero and norms at one, which would hide a bias that is never added.
    """
    config_class, fields = VARIANTS[name]
    torch.manual_seed(sum(map(ord, name)))
    auto = transformers.AutoModelForCausalLM
    if "multimodal" in name:
        auto = transformers.AutoModelForImageTextToText
    fields = copy.deepcopy({**SHAPE, **fields, **overrides})  # configs change what they are given
    model = auto.from_config(config_class(**fields), attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in parameter_name:
                parameter.normal_(0.0 if "gemma" in name else 1.0, 0.2)  # Gemma's are minus one
    return model.eval()


def save(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


@torch.inference_mode()
def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size] float32, one pass over everything without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def prompt_tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()

"""Tiny checkpoints of every family and config variant, written by transformers itself."""

from __future__ import annotations

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

Config = Callable[..., transformers.PreTrainedConfig]
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
}


def build_reference(
    name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> transformers.PreTrainedModel:
    """The variant's transformers model with eager attention and random weights, biases and norms included.

    transformers starts biases at zero and norms at one, which would hide a bias that is never added.
    """
    config_class, fields = VARIANTS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**SHAPE, **fields, **overrides}), attn_implementation="eager", dtype=dtype
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in parameter_name:
                parameter.normal_(1.0, 0.2)
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

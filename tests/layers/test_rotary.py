"""The rotary table against transformers' own module, bit for bit, at the parameters of real models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Olmo3Config, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from quire.layers.rotary import cos_sin_table
from quire.models.registry import resolve_spec

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "max_position_embeddings": 4096,
}
DEEPSEEK = {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_slow": 2}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "qwen-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "deepseek-yarn": {**DEEPSEEK, "original_max_position_embeddings": 1024},
    "yarn-smooth": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 1000,
    },
    "yarn-one-step-ramp": {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
    },
}


def tables(
    rope: dict[str, Any], *, max_model_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, transformers'), each [max_model_len, head_dim] float32."""
    config = LlamaConfig(**SHAPE, rope_parameters=dict(rope))
    x = torch.empty(1, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(max_model_len)[None])
    theirs = joined(cos, sin)
    spec = resolve_spec({**SHAPE, "architectures": ["LlamaForCausalLM"], "rope_scaling": rope})
    ours = cos_sin_table(spec.ropes[0], max_model_len=max_model_len, dtype=dtype)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_table_equals_transformers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    ours, theirs = tables(ROPES[name], max_model_len=4096, dtype=dtype)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_dynamic_beyond_the_trained_context_has_one_base() -> None:
    """What transformers uses for a sequence of exactly `max_model_len` tokens, at every position."""
    ours, theirs = tables(ROPES["dynamic"], max_model_len=6000, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # they round the base to float32
    within, _ = tables(ROPES["dynamic"], max_model_len=4096, dtype=torch.float32)
    assert not torch.allclose(ours[:4096], within, atol=0.1)


FULL, SLIDING = "full_attention", "sliding_attention"
BY_TYPE: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
    "olmo3": {
        FULL: {**ROPES["qwen-yarn"], "attention_factor": 1.2079441541679836},
        SLIDING: {"rope_type": "default", "rope_theta": 5e5},
    },
}
FAMILIES: dict[str, Any] = {
    "gemma3": (Gemma3TextConfig, Gemma3RotaryEmbedding),
    "olmo3": (Olmo3Config, Olmo3RotaryEmbedding),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_type_has_its_own_table(family: str, dtype: torch.dtype) -> None:
    """OLMo 3 keeps cos and sin in float32 whatever the model's dtype."""
    make_config, embedding = FAMILIES[family]
    fields = {**SHAPE, "num_hidden_layers": 2, "head_dim": 128, "layer_types": [SLIDING, FULL]}
    config = make_config(**fields, rope_parameters=copy.deepcopy(BY_TYPE[family]))
    module = embedding(config)
    written = {k: v for k, v in config.to_dict().items() if v is not None}
    spec = resolve_spec(written)
    for layer, layer_type in zip(spec.layers, [SLIDING, FULL], strict=True):
        assert layer.attention.rope is not None
        rope = spec.ropes[layer.attention.rope]
        theirs = joined(*module(torch.empty(1, dtype=dtype), torch.arange(4096)[None], layer_type))
        assert torch.equal(cos_sin_table(rope, max_model_len=4096, dtype=dtype), theirs)


def phi_tables(
    *, original: int, max_model_len: int, dtype: torch.dtype = torch.float32, **rope: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, transformers') of a Phi whose head has 128 dimensions."""
    fields = {**SHAPE, "original_max_position_embeddings": original, "num_key_value_heads": 4}
    config = Phi3Config(**fields, rope_parameters=copy.deepcopy(rope))
    positions = torch.arange(max_model_len)[None]
    theirs = joined(*Phi3RotaryEmbedding(config)(torch.empty(1, dtype=dtype), positions))
    spec = resolve_spec({**fields, "architectures": ["Phi3ForCausalLM"], "rope_parameters": rope})
    return cos_sin_table(spec.ropes[0], max_model_len=max_model_len, dtype=dtype), theirs


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 100 for i in range(48)],
    "long_factor": [1.1 + i * i / 60 for i in range(48)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("original", [1024, 2048])
def test_longrope_takes_the_factors_of_the_side_the_context_is_on(
    original: int, dtype: torch.dtype
) -> None:
    """max_model_len 2048: beyond 1024, and just within 2048."""
    ours, theirs = phi_tables(original=original, max_model_len=2048, dtype=dtype, **LONGROPE)
    assert ours.shape == (2048, 96) and torch.equal(ours, theirs)


def test_longrope_has_one_set_of_factors_for_every_position() -> None:
    """transformers takes the short ones in a prompt of 500 tokens; ours must not change as it grows."""
    long, _ = phi_tables(original=1024, max_model_len=2048, **LONGROPE)
    short, theirs = phi_tables(original=1024, max_model_len=500, **LONGROPE)
    assert torch.equal(short, theirs)
    assert not torch.allclose(long[:500], short, atol=0.1)


def test_a_part_of_the_head_rotates() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ours, theirs = phi_tables(original=4096, max_model_len=4096, **rope)
    assert ours.shape == (4096, 64) and torch.equal(ours, theirs)


def joined(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """transformers' tables, whose halves repeat, as one of ours."""
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float()

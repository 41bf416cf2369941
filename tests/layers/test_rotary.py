"""The rotary table against transformers' own module, bit for bit, at the parameters of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
    half = cos.shape[-1] // 2
    theirs = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float()
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

"""Qwen3 (dense): each head's q and k pass an RMSNorm before they rotate, and the head size is explicit.

Source: Yang et al. 2025 (Qwen3 technical report); `Qwen3Config` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.models.common import read_layer_windows, read_spec
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec

ARCHITECTURE = "Qwen3ForCausalLM"


def resolve(config: Mapping[str, object]) -> ModelSpec:
    """`attention_bias` covers q, k, v and o alike; `head_dim` is 128 where the file leaves it out."""
    reader = ConfigReader(config)
    attention_bias = reader.boolean("attention_bias", default=False)
    return read_spec(
        reader,
        architecture=ARCHITECTURE,
        model_type="qwen3",
        default_num_kv_heads=32,
        default_head_dim=128,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_windows=read_layer_windows(reader),
    )

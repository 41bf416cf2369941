"""Qwen3 (dense): each head's q and k pass an RMSNorm before they rotate, and the head size is explicit.

Source: Yang et al. 2025 (Qwen3 technical report); `Qwen3Config` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import read_layer_windows, read_sizes, read_spec, stack
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`attention_bias` covers q, k, v and o alike; `head_dim` is 128 where the file leaves it out."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="qwen3", default_num_kv_heads=32, default_head_dim=128)
    bias = reader.boolean("attention_bias", default=False)
    attention = replace(sizes.attention, qk_norm="head", qkv_bias=bias, o_bias=bias)
    windows = read_layer_windows(reader, num_layers=sizes.num_layers)
    layers = stack((replace(attention, window=window) for window in windows), sizes.mlp)
    return read_spec(reader, sizes, architecture=architecture, layers=layers)

"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and optionally a sliding window in the upper layers.

Source: Yang et al. 2024 (Qwen2 technical report); `Qwen2Config` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import read_layer_windows, read_sizes, read_spec, stack
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """The q, k, v bias is part of the architecture, not of the config."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="qwen2", default_num_kv_heads=32)
    windows = read_layer_windows(reader, num_layers=sizes.num_layers)
    attention = (replace(sizes.attention, qkv_bias=True, window=window) for window in windows)
    return read_spec(reader, sizes, architecture=architecture, layers=stack(attention, sizes.mlp))

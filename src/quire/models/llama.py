"""Llama 2, 3, 3.1 and 3.2, and the many models published under the same architecture name.

Source: Touvron et al. 2023 (Llama 2); Grattafiori et al. 2024 (Llama 3); `LlamaConfig` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import read_sizes, read_spec, stack
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`attention_bias` covers q, k, v and o alike; `mlp_bias` the three MLP projections."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="llama", default_num_kv_heads=None)
    bias = reader.boolean("attention_bias", default=False)
    attention = replace(sizes.attention, qkv_bias=bias, o_bias=bias)
    mlp = replace(sizes.mlp, bias=reader.boolean("mlp_bias", default=False))
    layers = stack([attention] * sizes.num_layers, mlp)
    return read_spec(
        reader, sizes, architecture=architecture, layers=layers, default_eos_token_ids=(2,)
    )

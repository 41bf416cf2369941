"""Granite 3 (dense): Llama with four multipliers, of embeddings, scores, residual additions and logits.

Source: IBM 2024 (Granite 3.0 language models); `GraniteConfig` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import read_sizes, read_spec, stack
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """A multiplier that is left out is 1, the scores' too. `logits_scaling` divides."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="granite", default_num_kv_heads=None)
    bias = reader.boolean("attention_bias", default=False)
    attention = replace(
        sizes.attention,
        scale=reader.number("attention_multiplier", default=1.0),
        qkv_bias=bias,
        o_bias=bias,
    )
    mlp = replace(sizes.mlp, bias=reader.boolean("mlp_bias", default=False))
    embed_scale = reader.number("embedding_multiplier", default=1.0)
    residual_scale = reader.number("residual_multiplier", default=1.0)
    logits_divisor = reader.number("logits_scaling", default=1.0)
    spec = read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack([attention] * sizes.num_layers, mlp),
        default_eos_token_ids=(2,),
    )
    return replace(
        spec,
        embed_scale=embed_scale,
        residual_scale=residual_scale,
        logits_divisor=logits_divisor,
    )

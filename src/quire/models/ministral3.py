"""Ministral 3 (text part): Mistral whose queries grow with their position, and a context stretched by YaRN.

Source: Mistral AI 2025 (Ministral 3); `Ministral3Config` in transformers 5.23. Query temperature: Nakanishi
2025 (Scalable-Softmax), as in Llama 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.layers.spec import NormSpec, QueryTemperature
from quire.models.common import read_sizes, read_spec, read_window, stack
from quire.models.fields import ConfigReader
from quire.models.rope_config import read_rope
from quire.models.spec import ModelSpec

BETA = "llama_4_scaling_beta"
DEFAULT_ROPE: Mapping[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """A `sliding_window` would hold in every layer; published files have none."""
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config = {**config, "rope_parameters": DEFAULT_ROPE}
    reader = ConfigReader(config)
    sizes = read_sizes(
        reader, model_type="ministral3", default_num_kv_heads=8, default_head_dim=128
    )
    attention = replace(
        sizes.attention,
        window=read_window(reader, default=None),
        query_temperature=_query_temperature(reader, sizes.max_position_embeddings),
    )
    rope = read_rope(
        reader, replace(sizes.rope_defaults(), family_keys=(BETA, "max_position_embeddings"))
    )
    return read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack([attention] * sizes.num_layers, sizes.mlp),
        norm=NormSpec(eps=1e-5),
        ropes=(rope,),
        default_eos_token_ids=(2,),
    )


def _query_temperature(reader: ConfigReader, max_position_embeddings: int) -> QueryTemperature:
    name = "rope_scaling" if reader.has("rope_scaling") else "rope_parameters"
    rope = ConfigReader(reader.mapping(name) or {}, prefix=f"{name}.")
    original = rope.integer("original_max_position_embeddings", default=max_position_embeddings)
    return QueryTemperature(beta=rope.number(BETA), original_length=original)

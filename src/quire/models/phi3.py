"""Phi-3, Phi-4 and Phi-4-mini: Llama with fused weights; long contexts by LongRoPE.

Source: Abdin et al. 2024 (Phi-3, Phi-4), Microsoft 2025 (Phi-4-mini); `Phi3Config` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.layers.spec import NormSpec
from quire.models.common import read_sizes, read_spec, read_window, stack
from quire.models.fields import ConfigReader
from quire.models.rope_config import read_rope
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`sliding_window` holds in every layer. The original context is 4096 tokens where no field says it."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="phi3", default_num_kv_heads=None)
    rope = read_rope(
        reader,
        replace(sizes.rope_defaults(), original_max_position_embeddings=4096, may_be_partial=True),
    )
    if rope.type not in ("default", "longrope"):
        # transformers reads Phi-3's "yarn" as longrope; nobody publishes it.
        field = "rope_scaling" if reader.has("rope_scaling") else "rope_parameters"
        raise reader.bad(field, "Phi-3 has default or longrope embeddings only")
    attention = replace(sizes.attention, window=read_window(reader, default=None), fused_qkv=True)
    mlp = replace(sizes.mlp, fused_gate_up=True)
    return read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack([attention] * sizes.num_layers, mlp),
        norm=NormSpec(eps=1e-5),
        ropes=(rope,),
        default_eos_token_ids=(32000,),
    )

"""OLMo 2 and 3: norms on the outputs of attention and MLP, and over all heads of q and k together.

OLMo 3 has a window in three of four layers, and stretches the rotary embedding of the others only.

Source: OLMo Team 2024 (OLMo 2) and 2025 (OLMo 3); `Olmo2Config` and `Olmo3Config` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.layers.spec import NormSpec, RopeSpec
from quire.models.common import (
    FULL,
    SLIDING,
    read_periodic_windows,
    read_sizes,
    read_spec,
    stack,
)
from quire.models.fields import ConfigReader
from quire.models.rope_config import read_rope, read_ropes
from quire.models.spec import ModelSpec

OLMO3_THETA = 500000.0


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`attention_bias` covers q, k, v and o alike. cos and sin stay in float32."""
    reader = ConfigReader(config)
    is_olmo3 = architecture == "Olmo3ForCausalLM"
    model_type = "olmo3" if is_olmo3 else "olmo2"
    sizes = read_sizes(reader, model_type=model_type, default_num_kv_heads=None)
    bias = reader.boolean("attention_bias", default=False)
    attention = replace(sizes.attention, qk_norm="whole", qkv_bias=bias, o_bias=bias)
    layers = [attention] * sizes.num_layers
    ropes: tuple[RopeSpec, ...]
    if is_olmo3:
        # transformers 5.23 forgets rope_theta in layers with a window; published files hold its default.
        theta = reader.number("rope_theta", default=OLMO3_THETA, above=1.0)
        by_type = read_ropes(reader, sizes.rope_defaults(theta=OLMO3_THETA), sliding_theta=theta)
        ropes = (by_type[FULL], by_type[SLIDING])
        layers = [
            replace(attention, window=window, rope=0 if window is None else 1)
            for window in read_periodic_windows(reader, num_layers=sizes.num_layers, period=4)
        ]
    else:
        ropes = (read_rope(reader, sizes.rope_defaults()),)
    return read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack(layers, sizes.mlp, placement="post"),
        norm=NormSpec(eps=1e-5, order="scale_then_round"),
        ropes=tuple(replace(rope, rounded=False) for rope in ropes),
        default_eos_token_ids=(50279,),
    )

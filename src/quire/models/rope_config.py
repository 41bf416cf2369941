"""From a config's rotary fields, in either of transformers' two spellings, to a `RopeSpec`.

transformers 4 writes `rope_theta` beside an optional `rope_scaling` whose kind is under `rope_type`
or, older, `type`; transformers 5 writes one `rope_parameters`. Precedence follows transformers
5.23: `rope_scaling` over `rope_parameters`, and a theta inside the mapping over one outside it. Where only
`rope_parameters` has a theta, it counts beside `rope_scaling` too (transformers would take 10,000).
"""

from __future__ import annotations

import math
from typing import get_args

from quire.layers.spec import RopeSpec, RopeType
from quire.models.fields import ConfigReader

SUPPORTED_TYPES: tuple[RopeType, ...] = get_args(RopeType)
DEFAULT_THETA = 10000.0
HARMLESS_KEYS = (
    "finetuned factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
    "mscale_all_dim truncate low_freq_factor high_freq_factor"
).split()
"""Keys some type uses; transformers ignores them on the others, and so do we."""


def read_rope(reader: ConfigReader, *, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    """Read and check every rotary field of a config."""
    outer_theta = reader.number("rope_theta", default=DEFAULT_THETA, above=1.0)
    old, new = reader.mapping("rope_scaling"), reader.mapping("rope_parameters")
    name, values = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if any(isinstance(value, dict) for value in values.values()):
        raise reader.bad(
            name, "one rotary embedding per layer type is not supported, only one for all layers"
        )
    rope = ConfigReader(values, prefix=f"{name}.")
    kind = _rope_type(rope)
    if old and new and not reader.has("rope_theta"):
        # Somebody added rope_scaling, as model cards say, to a file whose theta is in rope_parameters.
        beside = ConfigReader(new, prefix="rope_parameters.")
        outer_theta = beside.number("rope_theta", default=outer_theta, above=1.0)
    theta = rope.number("rope_theta", default=outer_theta, above=1.0)
    for owner in (reader, rope):
        if owner.number("partial_rotary_factor", default=1.0) != 1.0:
            raise owner.bad(
                "partial_rotary_factor", "only 1.0 is supported (the whole head rotates)"
            )
    # transformers lets the field outside the mapping win (Phi-3 put it there first).
    inner_original = rope.integer(
        "original_max_position_embeddings", default=max_position_embeddings
    )
    original = reader.integer("original_max_position_embeddings", default=inner_original)
    rope.finish(ignored=HARMLESS_KEYS)
    if kind == "default":
        return RopeSpec(rotary_dim=head_dim, theta=theta)
    if kind == "yarn":
        return _yarn(
            rope,
            rotary_dim=head_dim,
            theta=theta,
            original=original,
            max_position_embeddings=max_position_embeddings,
        )
    factor = rope.number("factor")
    if factor < 1.0:
        raise rope.bad("factor", "it must be at least 1")
    if kind == "linear":
        return RopeSpec(rotary_dim=head_dim, type="linear", theta=theta, factor=factor)
    if kind == "dynamic":
        return RopeSpec(
            rotary_dim=head_dim,
            type="dynamic",
            theta=theta,
            factor=factor,
            original_max_position_embeddings=max_position_embeddings,
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.bad("high_freq_factor", f"it must be greater than low_freq_factor ({low:g})")
    return RopeSpec(
        rotary_dim=head_dim,
        type="llama3",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _rope_type(rope: ConfigReader) -> RopeType:
    field = "rope_type" if rope.has("rope_type") else "type"
    rope.raw("type")
    name = rope.text(field, default="default")
    for kind in SUPPORTED_TYPES:
        if name == kind:
            return kind
    raise rope.bad(field, f"supported rotary types are {', '.join(SUPPORTED_TYPES)}")


def _yarn(
    rope: ConfigReader,
    *,
    rotary_dim: int,
    theta: float,
    original: int,
    max_position_embeddings: int,
) -> RopeSpec:
    factor = rope.number("factor", default=max(1.0, max_position_embeddings / original))
    if factor < 1.0:
        raise rope.bad("factor", "it must be at least 1")
    beta_fast, beta_slow = (
        rope.number("beta_fast", default=32.0),
        rope.number("beta_slow", default=1.0),
    )
    if beta_fast < beta_slow:
        raise rope.bad("beta_fast", f"it must not be less than beta_slow ({beta_slow:g})")
    return RopeSpec(
        rotary_dim=rotary_dim,
        type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.boolean("truncate", default=True),
    )


def _yarn_attention_factor(rope: ConfigReader, factor: float) -> float:
    """The temperature of YaRN (Peng et al. 2023, section 3.4), or DeepSeek's ratio of two where both
    mscales are given.
    """
    mscale = rope.number("mscale", default=0.0, above=None)
    mscale_all_dim = rope.number("mscale_all_dim", default=0.0, above=None)

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)

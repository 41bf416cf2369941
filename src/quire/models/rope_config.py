"""From a config's rotary fields, in either of transformers' two spellings, to a `RopeSpec`.

transformers 4 writes `rope_theta` beside an optional `rope_scaling` whose kind is under `rope_type`
or, older, `type`; transformers 5 writes one `rope_parameters`, nested by layer type where layers differ.
Precedence follows transformers 5.23: `rope_scaling` over `rope_parameters`, and a theta inside the mapping
over one outside it. Where only `rope_parameters` has a theta, it counts beside `rope_scaling` too
(transformers would take 10,000).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from quire.layers.spec import RopeSpec, RopeType
from quire.models.fields import ConfigReader

SUPPORTED_TYPES: tuple[RopeType, ...] = get_args(RopeType)
FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_THETA = 10000.0
HARMLESS_KEYS = (
    "finetuned factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
    "mscale_all_dim truncate low_freq_factor high_freq_factor short_factor long_factor"
).split()
"""Keys some type uses; transformers ignores them on the others, and so do we."""


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What a family's rotary embedding has besides its config."""

    head_dim: int
    max_position_embeddings: int
    theta: float = DEFAULT_THETA
    original_max_position_embeddings: int | None = None
    """Where no field says it; None: `max_position_embeddings`."""
    may_be_partial: bool = False
    """Whether `partial_rotary_factor` counts. Most families ignore it; it must be 1 there."""
    family_keys: tuple[str, ...] = ()
    """Keys inside the mapping that the family reads itself."""


def read_rope(reader: ConfigReader, defaults: RopeDefaults) -> RopeSpec:
    """The one rotary embedding of all layers."""
    theta = reader.number("rope_theta", default=defaults.theta, above=1.0)
    old, new = reader.mapping("rope_scaling"), reader.mapping("rope_parameters")
    name, values = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if any(isinstance(value, dict) for value in values.values()):
        raise reader.bad(
            name, "one rotary embedding per layer type is not supported, only one for all layers"
        )
    if old and new and not reader.has("rope_theta"):
        # Somebody added rope_scaling, as model cards say, to a file whose theta is in rope_parameters.
        beside = ConfigReader(new, prefix="rope_parameters.")
        theta = beside.number("rope_theta", default=theta, above=1.0)
    return _read_one(reader, ConfigReader(values, prefix=f"{name}."), defaults, theta=theta)


def read_ropes(
    reader: ConfigReader, defaults: RopeDefaults, *, sliding_theta: float
) -> dict[str, RopeSpec]:
    """One for layers of full attention, one for those with a window.

    transformers 5 nests `rope_parameters` by layer type; before, `rope_scaling` was full attention's alone.

    Args:
        sliding_theta: of sliding layers, where `rope_parameters` does not say it.
    """
    nested, old = reader.mapping("rope_parameters") or {}, reader.mapping("rope_scaling") or {}
    for name in nested:
        if name not in (FULL, SLIDING):
            raise reader.bad("rope_parameters", f"it must be nested by {FULL} and {SLIDING}")
    by_type = ConfigReader(nested, prefix="rope_parameters.")
    thetas = {
        FULL: reader.number("rope_theta", default=defaults.theta, above=1.0),
        SLIDING: sliding_theta,
    }
    ropes = {}
    for layer_type, theta in thetas.items():
        values: Mapping[str, object] = by_type.mapping(layer_type) or {}
        prefix = f"rope_parameters.{layer_type}."
        if layer_type == FULL and old:
            values, prefix = {**values, **old}, "rope_scaling."
        rope = ConfigReader(values, prefix=prefix)
        ropes[layer_type] = _read_one(reader, rope, defaults, theta=theta)
    return ropes


def _read_one(
    reader: ConfigReader, rope: ConfigReader, defaults: RopeDefaults, *, theta: float
) -> RopeSpec:
    """rope: the mapping; reader: the fields around it. theta: where the mapping has none."""
    kind = _rope_type(rope)
    theta = rope.number("rope_theta", default=theta, above=1.0)
    rotary_dim = _rotary_dim(reader, rope, defaults)
    longest = defaults.max_position_embeddings
    # transformers lets the field outside the mapping win (Phi-3 put it there first).
    original = rope.integer(
        "original_max_position_embeddings",
        default=defaults.original_max_position_embeddings or longest,
    )
    original = reader.integer("original_max_position_embeddings", default=original)
    rope.finish(ignored=(*HARMLESS_KEYS, *defaults.family_keys))
    spec = RopeSpec(rotary_dim=rotary_dim, type=kind, theta=theta)
    if kind == "default":
        return spec
    implied = max(1.0, longest / original) if kind in ("yarn", "longrope") else None
    factor = rope.number("factor", default=implied)
    if factor < 1.0:
        raise rope.bad("factor", "it must be at least 1")
    spec = replace(spec, factor=factor, original_max_position_embeddings=original)
    match kind:
        case "linear":
            return replace(spec, original_max_position_embeddings=0)
        case "dynamic":
            return replace(spec, original_max_position_embeddings=longest)
        case "llama3":
            return _llama3(rope, spec)
        case "yarn":
            return _yarn(rope, spec)
        case "longrope":
            return _longrope(rope, spec)


def _rope_type(rope: ConfigReader) -> RopeType:
    field = "rope_type" if rope.has("rope_type") else "type"
    rope.raw("type")
    name = rope.text(field, default="default")
    for kind in SUPPORTED_TYPES:
        if name == kind or (name, kind) == ("su", "longrope"):  # "su": longrope's first name
            return kind
    raise rope.bad(field, f"supported rotary types are {', '.join(SUPPORTED_TYPES)}")


def _rotary_dim(reader: ConfigReader, rope: ConfigReader, defaults: RopeDefaults) -> int:
    """How many dimensions rotate; the factor inside the mapping counts before the one outside."""
    share = 1.0
    for owner in (reader, rope):
        share = owner.number("partial_rotary_factor", default=share)
        if not defaults.may_be_partial and share != 1.0:
            raise owner.bad(
                "partial_rotary_factor", "only 1.0 is supported (the whole head rotates)"
            )
    dim = int(defaults.head_dim * share)
    if dim % 2 or not 0 < dim <= defaults.head_dim:
        owner = rope if rope.has("partial_rotary_factor") else reader
        rule = f"an even number of a head's {defaults.head_dim} dimensions must rotate, not {dim}"
        raise owner.bad("partial_rotary_factor", rule)
    return dim


def _llama3(rope: ConfigReader, spec: RopeSpec) -> RopeSpec:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.bad("high_freq_factor", f"it must be greater than low_freq_factor ({low:g})")
    return replace(spec, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: ConfigReader, spec: RopeSpec) -> RopeSpec:
    beta_fast = rope.number("beta_fast", default=32.0)
    beta_slow = rope.number("beta_slow", default=1.0)
    if beta_fast < beta_slow:
        raise rope.bad("beta_fast", f"it must not be less than beta_slow ({beta_slow:g})")
    return replace(
        spec,
        attention_factor=_yarn_attention_factor(rope, spec.factor),
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


def _longrope(rope: ConfigReader, spec: RopeSpec) -> RopeSpec:
    """LongRoPE (Ding et al. 2024): a divisor for each frequency, found by search."""
    original = spec.original_max_position_embeddings
    scaled = 1.0
    if spec.factor > 1.0:
        if original < 2:
            raise rope.bad("original_max_position_embeddings", "longrope needs at least 2")
        scaled = math.sqrt(1 + math.log(spec.factor) / math.log(original))
    return replace(
        spec,
        attention_factor=rope.number("attention_factor", default=scaled),
        short_factors=rope.numbers("short_factor", count=spec.rotary_dim // 2),
        long_factors=rope.numbers("long_factor", count=spec.rotary_dim // 2),
    )

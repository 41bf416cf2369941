"""Gemma 2 and 3: norms before and after attention and MLP, scaled embeddings, a window in most layers.

Gemma 2 caps scores and logits; Gemma 3 has q/k norms instead, and another rotary embedding in layers with a
window. Of the multimodal Gemma 3 this is the text part.

Source: Gemma Team 2024 (Gemma 2) and 2025 (Gemma 3); `Gemma2Config` and `Gemma3TextConfig` in
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.layers.spec import AttentionSpec, NormSpec, RopeSpec
from quire.models.common import (
    FULL,
    SLIDING,
    Sizes,
    read_periodic_windows,
    read_sizes,
    read_spec,
    read_window,
    stack,
)
from quire.models.fields import ConfigReader
from quire.models.rope_config import read_rope, read_ropes
from quire.models.spec import ModelSpec

DEFAULTS: Mapping[str, object] = {
    "num_attention_heads": 8,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
}
"""Published files leave out what the config class assumes."""
GEMMA2_DEFAULTS = {**DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192}
GEMMA3_DEFAULTS = {**DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`query_pre_attn_scalar` stands where others have the head size: scores are divided by its root."""
    is_gemma3 = architecture == "Gemma3ForCausalLM"
    reader = ConfigReader({**(GEMMA3_DEFAULTS if is_gemma3 else GEMMA2_DEFAULTS), **config})
    sizes = read_sizes(
        reader,
        model_type="gemma3_text" if is_gemma3 else "gemma2",
        default_num_kv_heads=4,
        default_head_dim=256,
        activation="gelu_tanh",
    )
    bias = reader.boolean("attention_bias", default=False)
    plain = replace(
        sizes.attention,
        scale=reader.number("query_pre_attn_scalar", default=256.0) ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
    )
    attention, ropes = (_gemma3 if is_gemma3 else _gemma2)(reader, sizes, plain)
    logits_softcap = _softcap(reader, "final_logit_softcapping", default=0.0 if is_gemma3 else 30.0)
    spec = read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack(attention, sizes.mlp, placement="sandwich"),
        norm=NormSpec(eps=1e-6, order="scale_then_round", plus_one=True),
        ropes=ropes,
        default_tied=True,
        default_eos_token_ids=(1,),
    )
    return replace(
        spec,
        embed_scale=sizes.hidden_size**0.5,
        embed_scale_rounded=True,
        logits_softcap=logits_softcap,
    )


def _gemma2(
    reader: ConfigReader, sizes: Sizes, plain: AttentionSpec
) -> tuple[list[AttentionSpec], tuple[RopeSpec, ...]]:
    """Each layer's attention, and the ropes. Every second layer sees everything."""
    softcap = _softcap(reader, "attn_logit_softcapping", default=50.0)
    windows = read_periodic_windows(reader, num_layers=sizes.num_layers, period=2)
    size, window = reader.raw("sliding_window_size"), read_window(reader, default=4096)
    if size not in (None, window):  # the 9B model's file has both
        raise reader.bad("sliding_window_size", f"it differs from sliding_window ({window})")
    layers = [replace(plain, softcap=softcap, window=window) for window in windows]
    return layers, (read_rope(reader, sizes.rope_defaults()),)


def _gemma3(
    reader: ConfigReader, sizes: Sizes, plain: AttentionSpec
) -> tuple[list[AttentionSpec], tuple[RopeSpec, ...]]:
    """The same. Every sixth layer sees everything; the others rotate by a rope of their own."""
    period = reader.integer("sliding_window_pattern", default=6)
    ropes = read_ropes(
        reader,
        sizes.rope_defaults(theta=1e6),
        sliding_theta=reader.number("rope_local_base_freq", default=1e4, above=1.0),
    )
    layers = [
        replace(plain, qk_norm="head", window=window, rope=0 if window is None else 1)
        for window in read_periodic_windows(reader, num_layers=sizes.num_layers, period=period)
    ]
    return layers, (ropes[FULL], ropes[SLIDING])


def _softcap(reader: ConfigReader, field: str, *, default: float) -> float:
    return 0.0 if reader.nulled(field) else reader.number(field, default=default)

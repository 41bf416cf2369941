"""What each family's config becomes: the parts of its layers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.errors import UnsupportedModelError
from quire.layers.spec import MlpSpec, NormSpec, QueryTemperature, RopeSpec
from quire.models.registry import resolve_spec, text_config
from quire.models.spec import ModelSpec
from tests.models.published import (
    GEMMA_2_2B,
    GEMMA_3_1B,
    GEMMA_3_4B,
    GRANITE_3_1_2B,
    MINISTRAL_3_3B,
    MISTRAL_SMALL_3_1,
    OLMO_2_7B,
    OLMO_3_7B,
    PHI_3_MINI_4K,
    PHI_4,
    PHI_4_MINI,
    SMOLLM3_3B,
)
from tests.models.variants import VARIANTS, build_reference, save


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_saves_resolves_with_its_parameter_count(
    name: str, tmp_path: Path
) -> None:
    model = build_reference(name)
    save(model, tmp_path)
    spec = resolve_spec(json.loads((tmp_path / "config.json").read_text()))
    text = [
        parameter.numel()
        for parameter_name, parameter in model.named_parameters()
        if "vision" not in parameter_name and "projector" not in parameter_name
    ]
    assert spec.num_parameters() == sum(text)


def test_gemma_2() -> None:
    spec = resolve_spec(GEMMA_2_2B)
    local, full = spec.layers[:2]
    assert spec.layers == (local, full) * 13 and local.placement == "sandwich"
    assert full.attention == replace(local.attention, window=None)
    assert (local.attention.window, local.attention.softcap) == (4096, 50.0)
    assert (local.attention.scale, local.attention.qk_norm) == (256**-0.5, "none")
    assert local.mlp == MlpSpec(intermediate_size=9216, activation="gelu_tanh")
    assert spec.norm == NormSpec(eps=1e-6, order="scale_then_round", plus_one=True)
    assert spec.embed_scale == 48.0 and spec.embed_scale_rounded
    assert (spec.logits_softcap, spec.tie_word_embeddings) == (30.0, True)
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = resolve_spec({**GEMMA_2_2B, **uncapped})
    assert spec.logits_softcap == spec.layers[0].attention.softcap == 0
    assert resolve_spec({**GEMMA_2_2B, "sliding_window_size": 4096}).windows[:2] == (4096, None)


def test_gemma_3_has_a_rope_of_its_own_in_layers_with_a_window() -> None:
    spec = resolve_spec(GEMMA_3_1B)
    assert spec.windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert [layer.attention.rope for layer in spec.layers[4:7]] == [1, 0, 1]
    assert spec.ropes == (
        RopeSpec(rotary_dim=256, theta=1e6),
        RopeSpec(rotary_dim=256, theta=1e4),
    )
    attention = spec.layers[0].attention
    assert (attention.qk_norm, attention.softcap, spec.logits_softcap) == ("head", 0.0, 0.0)


def test_a_linear_factor_stretches_only_the_global_rope_and_not_the_context() -> None:
    spec = resolve_spec(GEMMA_3_4B)
    full = RopeSpec(rotary_dim=256, type="linear", theta=1e6, factor=8.0)
    assert spec.ropes == (full, RopeSpec(rotary_dim=256, theta=1e4))
    assert spec.context_length == 131072


NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
}


def test_both_spellings_of_ropes_by_layer_type_are_the_same() -> None:
    old = {**GEMMA_3_1B, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    new = {k: v for k, v in GEMMA_3_1B.items() if not k.startswith("rope_")}
    expected = resolve_spec(old)
    assert resolve_spec({**new, "rope_parameters": NESTED}) == expected
    without_thetas = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    assert resolve_spec({**new, "rope_parameters": without_thetas}) == expected


def test_fields_around_text_config_count_before_those_inside() -> None:
    spec = resolve_spec(GEMMA_3_4B)
    assert (spec.architecture, spec.hidden_size, spec.vocab_size) == (
        "Gemma3ForCausalLM", 2560, 262208,
    )  # fmt: skip
    assert spec.checkpoint_dtype == "bfloat16" and spec.tie_word_embeddings
    assert text_config(GEMMA_3_4B)["eos_token_id"] == [1, 106]
    assert not resolve_spec({**GEMMA_3_4B, "tie_word_embeddings": False}).tie_word_embeddings
    assert resolve_spec({**GEMMA_3_4B, "max_position_embeddings": 4096}).context_length == 4096
    assert text_config(OLMO_2_7B) is OLMO_2_7B
    small = resolve_spec(MISTRAL_SMALL_3_1)
    assert (small.architecture, small.tie_word_embeddings) == ("MistralForCausalLM", False)


def test_olmo() -> None:
    spec = resolve_spec(OLMO_2_7B)
    [layer] = set(spec.layers)
    assert (layer.placement, layer.attention.qk_norm) == ("post", "whole")
    assert spec.norm == NormSpec(eps=1e-6, order="scale_then_round")
    assert spec.ropes == (RopeSpec(rotary_dim=128, theta=5e5, rounded=False),)
    spec = resolve_spec(OLMO_3_7B)
    assert spec.windows == (4096, 4096, 4096, None) * 8
    assert [rope.type for rope in spec.ropes] == ["yarn", "default"]
    assert [layer.attention.rope for layer in spec.layers[:4]] == [1, 1, 1, 0]
    assert resolve_spec({**OLMO_3_7B, "layer_types": None}) == spec
    other = resolve_spec({**OLMO_3_7B, "rope_theta": 1e4})
    assert [rope.theta for rope in other.ropes] == [1e4, 1e4]


def test_phi() -> None:
    spec = resolve_spec(PHI_3_MINI_4K)
    assert spec.windows == (2047,) * 32
    assert spec.layers[0].attention.fused_qkv and spec.layers[0].mlp.fused_gate_up
    assert resolve_spec(PHI_4).ropes == (RopeSpec(rotary_dim=128, theta=250000.0),)
    [rope] = resolve_spec(PHI_4_MINI).ropes
    assert (rope.type, rope.rotary_dim, rope.factor) == ("longrope", 96, 32.0)
    assert rope.attention_factor == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    assert (rope.short_factors[1], rope.long_factors[1]) == (1.0, 1.5)
    assert resolve_spec(PHI_4_MINI).context_length == 131072
    given = {**PHI_4_MINI["rope_scaling"], "attention_factor": 1.5, "factor": 2.0}  # type: ignore[dict-item]
    [rope] = resolve_spec({**PHI_4_MINI, "rope_scaling": given}).ropes
    assert (rope.factor, rope.attention_factor) == (2.0, 1.5)
    named_before = {**PHI_4_MINI["rope_scaling"], "type": "su"}  # type: ignore[dict-item]
    assert resolve_spec({**PHI_4_MINI, "rope_scaling": named_before}) == resolve_spec(PHI_4_MINI)


def test_granite() -> None:
    spec = resolve_spec(GRANITE_3_1_2B)
    assert (spec.embed_scale, spec.embed_scale_rounded) == (12.0, False)
    assert (spec.residual_scale, spec.logits_divisor) == (0.22, 8.0)
    assert spec.layers[0].attention.scale == 0.015625
    lean = {k: v for k, v in GRANITE_3_1_2B.items() if "multiplier" not in k}
    assert resolve_spec(lean).layers[0].attention.scale == 1.0


def test_smollm3() -> None:
    spec = resolve_spec(SMOLLM3_3B)
    assert [layer.attention.rope for layer in spec.layers] == [0, 0, 0, None] * 9
    assert spec.windows == (None,) * 36
    by_interval = {
        k: v for k, v in SMOLLM3_3B.items() if k not in ("no_rope_layers", "layer_types")
    }
    assert resolve_spec(by_interval) == spec
    windowed = resolve_spec({**by_interval, "use_sliding_window": True, "sliding_window": 512})
    assert windowed.windows == (None, None, None, 512) * 9


def test_ministral_3() -> None:
    spec = resolve_spec(MINISTRAL_3_3B)
    assert spec.layers[0].attention.query_temperature == QueryTemperature(0.1, 16384)
    assert (spec.context_length, spec.tie_word_embeddings) == (262144, True)
    [rope] = spec.ropes
    assert (rope.type, rope.factor, rope.attention_factor) == ("yarn", 16.0, 1.0)
    text: Any = MINISTRAL_3_3B["text_config"]
    bare = {k: v for k, v in text.items() if k != "rope_parameters"}
    assert resolve_spec({**MINISTRAL_3_3B, "text_config": bare}) == spec


PUBLISHED = {"gemma2": GEMMA_2_2B, "gemma3": GEMMA_3_1B, "multimodal": GEMMA_3_4B,
             "olmo2": OLMO_2_7B, "olmo3": OLMO_3_7B, "phi": PHI_4_MINI, "granite": GRANITE_3_1_2B,
             "smollm3": SMOLLM3_3B, "ministral3": MINISTRAL_3_3B}  # fmt: skip
LONGROPE: Mapping[str, object] = PHI_4_MINI["rope_scaling"]  # type: ignore[assignment]
REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'.*gelu_pytorch_tanh"),
    ("gemma2", {"sliding_window": None}, "layer_types.*needs sliding_window"),
    ("gemma2", {"sliding_window_size": 2048}, "sliding_window_size is 2048.*4096"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"rope_parameters": NESTED}, "rope_parameters.*per layer type"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.*full_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "x"}}},
     "rope_parameters.full_attention.rope_type is 'x'"),
    ("multimodal", {"audio_config": {}}, "audio_config"),
    ("multimodal", {"quantization_config": {"quant_method": "hqq"}}, "quantization_config.*hqq"),
    ("multimodal", {"text_config": {"model_type": "gemma4_text"}}, "model_type is 'gemma4_text'"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("olmo3", {"sliding_window": None}, "layer_types.*needs sliding_window"),
    ("phi", {"partial_rotary_factor": 0.01}, "partial_rotary_factor is 0.01.*even"),
    ("phi", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    ("phi", {"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 47}}, "long_factor.*48 numbers"),
    ("phi", {"rope_scaling": {**LONGROPE, "short_factor": [0.0] * 48}}, r"short_factor\[0\] is 0.0"),
    ("phi", {"rope_scaling": {**LONGROPE, "short_factor": None}}, "short_factor is missing"),
    ("phi", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.*longrope"),
    ("phi", {"full_attn_mod": 2}, "full_attn_mod is 2"),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0"),
    ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("smollm3", {"no_rope_layers": [1] * 35}, "no_rope_layers.*36"),
    ("smollm3", {"no_rope_layers": [True] * 36}, "no_rope_layers.*36"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 36}, "layer_types.*use_sliding_window"),
    ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta is missing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "message"), REFUSED, ids=lambda value: str(value)[:50]
)
def test_what_a_family_does_not_implement_is_refused_by_name(
    family: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_spec({**PUBLISHED[family], **change})


def test_each_layer_of_a_spec_names_a_rope_that_exists() -> None:
    specs: list[ModelSpec] = [resolve_spec(config) for config in PUBLISHED.values()]
    for spec in specs:
        used = {layer.attention.rope for layer in spec.layers} - {None}
        assert used == set(range(len(spec.ropes)))

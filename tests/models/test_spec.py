"""Resolving config.json: what is read, what is ignored, and how everything else is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UnsupportedModelError
from quire.layers.spec import AttentionSpec, HeadShape, MlpSpec, NormSpec, RopeSpec
from quire.models.registry import FAMILIES, MULTIMODAL, resolve_spec
from quire.models.spec import LayerSpec, ModelSpec
from quire.quantization.unquantized import UNQUANTIZED
from tests.models.published import (
    GEMMA_2_2B,
    GEMMA_3_1B,
    GRANITE_3_1_2B,
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    MISTRAL_7B_V01,
    MISTRAL_NEMO,
    PARAMETER_COUNTS,
    PHI_4_MINI,
    QWEN2_5_05B,
    QWEN3_06B,
    SMOLLM3_3B,
)


def without(config: Mapping[str, object], *fields: str) -> dict[str, object]:
    return {name: value for name, value in config.items() if name not in fields}


@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_published_models_resolve_with_their_parameter_counts(name: str) -> None:
    config, count = PARAMETER_COUNTS[name]
    assert resolve_spec(config).num_parameters() == count


def test_resolving_a_spec_does_not_import_torch() -> None:
    code = (
        "import sys; from quire.models.registry import resolve_spec; import quire.models.spec;"
        f"resolve_spec({dict(LLAMA_3_1_8B)!r}); resolve_spec({dict(QWEN3_06B)!r});"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_of_a_spec() -> None:
    layer = LayerSpec(
        placement="pre",
        attention=AttentionSpec(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            scale=128**-0.5,
            window=None,
            rope=0,
            softcap=0.0,
            qk_norm="none",
            qkv_bias=False,
            o_bias=False,
            fused_qkv=False,
            query_temperature=None,
        ),
        mlp=MlpSpec(intermediate_size=14336, activation="silu", bias=False, fused_gate_up=False),
    )
    assert resolve_spec(LLAMA_3_1_8B) == ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        layers=(layer,) * 32,
        norm=NormSpec(eps=1e-5, order="round_then_scale", plus_one=False),
        ropes=(
            RopeSpec(
                rotary_dim=128,
                type="llama3",
                theta=500000.0,
                factor=8.0,
                original_max_position_embeddings=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
        context_length=131072,
        context_source="max_position_embeddings",
        tie_word_embeddings=False,
        has_head=True,
        checkpoint_dtype="bfloat16",
        default_eos_token_ids=(2,),
        embed_scale=1.0,
        embed_scale_rounded=False,
        residual_scale=1.0,
        logits_divisor=1.0,
        logits_softcap=0.0,
        quantization=UNQUANTIZED,
    )


def test_memory_figures() -> None:
    spec = resolve_spec(QWEN3_06B)
    assert spec.kv_bytes_per_token(2) == 2 * 28 * 8 * 128 * 2
    assert spec.weight_bytes(2) == 2 * 596_049_920  # tied, and held once
    assert resolve_spec(LLAMA_2_7B).weight_bytes(2) == 2 * 6_738_415_616


def test_families_differ_where_they_should() -> None:
    mistral, nemo = resolve_spec(MISTRAL_7B_V01), resolve_spec(MISTRAL_NEMO)
    assert mistral.windows == (4096,) * 32 and nemo.windows == (None,) * 40
    assert nemo.heads == HeadShape(32, 8, 128) and nemo.heads.q_size == 4096 != nemo.hidden_size
    qwen2, qwen3 = (resolve_spec(c).layers[0].attention for c in (QWEN2_5_05B, QWEN3_06B))
    assert qwen2.qkv_bias and not qwen2.o_bias and qwen2.qk_norm == "none"
    assert qwen3.qk_norm == "head" and not qwen3.qkv_bias
    biased = resolve_spec({**LLAMA_2_7B, "attention_bias": True, "mlp_bias": True}).layers[0]
    assert biased.attention.qkv_bias and biased.attention.o_bias and biased.mlp.bias


def test_windows_by_layer() -> None:
    config = {**QWEN2_5_05B, "num_hidden_layers": 4, "max_window_layers": 2, "sliding_window": 64}
    assert resolve_spec(config).windows == (None,) * 4
    config["use_sliding_window"] = True
    assert resolve_spec(config).windows == (None, None, 64, 64)
    config["layer_types"] = ["full_attention", "sliding_attention"] * 2
    assert resolve_spec(config).windows == (None, 64, None, 64)
    config["sliding_window"] = None
    with pytest.raises(UnsupportedModelError, match=r"layer_types.*needs sliding_window"):
        resolve_spec(config)


def test_defaults_are_those_of_transformers_config_classes() -> None:
    lean = without(LLAMA_2_7B, "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    lean = without(lean, "torch_dtype", "eos_token_id", "rope_scaling")
    spec = resolve_spec(lean)
    assert (spec.heads.num_kv_heads, spec.norm.eps, spec.ropes[0].theta) == (32, 1e-6, 10000.0)
    assert (spec.default_eos_token_ids, spec.checkpoint_dtype) == ((2,), None)
    assert resolve_spec({**lean, "eos_token_id": None}).default_eos_token_ids == ()
    assert resolve_spec(QWEN3_06B).default_eos_token_ids == ()
    assert resolve_spec(without(MISTRAL_7B_V01, "num_key_value_heads")).heads.num_kv_heads == 8
    assert resolve_spec({**MISTRAL_7B_V01, "num_key_value_heads": None}).heads.num_kv_heads == 32
    assert resolve_spec(without(MISTRAL_7B_V01, "sliding_window")).windows[0] == 4096
    assert resolve_spec(without(QWEN3_06B, "head_dim")).heads.head_dim == 128


def test_transformers_5_spelling_equals_transformers_4() -> None:
    old = dict(LLAMA_3_1_8B)
    new = without(old, "rope_scaling", "rope_theta", "torch_dtype")
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    new["dtype"] = old["torch_dtype"]
    assert resolve_spec(new) == resolve_spec(old)
    older = {**old, "rope_scaling": {**without(old["rope_scaling"], "rope_type"), "type": "llama3"}}
    assert resolve_spec(older) == resolve_spec(old)


@pytest.mark.parametrize("config", [LLAMA_2_7B, MISTRAL_7B_V01, QWEN2_5_05B, QWEN3_06B])
def test_architectures_as_published(config: Mapping[str, object]) -> None:
    """A base model is the same model; without `architectures` the model_type decides."""
    [name] = config["architectures"]  # type: ignore[misc]
    base = name.replace("ForCausalLM", "Model")
    for architectures in ([base], None, []):
        assert resolve_spec({**config, "architectures": architectures}) == resolve_spec(config)
    assert resolve_spec(without(config, "architectures")) == resolve_spec(config)


NULLED = [
    "head_dim", "quantization_config", "rope_scaling", "tie_word_embeddings", "attention_bias",
    "num_experts", "sliding_window", "pad_token_id", "eos_token_id",
]  # fmt: skip


@pytest.mark.parametrize("field", NULLED)
def test_a_null_field_is_an_absent_one(field: str) -> None:
    expected = resolve_spec(without(LLAMA_2_7B, field))
    if field == "eos_token_id":  # here null says that there is none
        expected = dataclasses.replace(expected, default_eos_token_ids=())
    assert resolve_spec({**LLAMA_2_7B, field: None}) == expected


def test_an_empty_quantization_config_is_none() -> None:
    assert resolve_spec({**LLAMA_2_7B, "quantization_config": {}}) == resolve_spec(LLAMA_2_7B)


def yarn(**fields: object) -> dict[str, object]:
    return {"rope_type": "yarn", "factor": 4.0, **fields}


def llama3(**fields: object) -> dict[str, object]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", "factor": 8.0, **scaling, **fields}


CONTEXTS: list[tuple[dict[str, object], int]] = [  # LLAMA_2_7B has 4096 positions
    ({}, 4096),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, 16384),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 10240),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 16384),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
    ({"rope_scaling": {"rope_type": "default"}}, 4096),
    ({"rope_scaling": llama3(original_max_position_embeddings=512)}, 4096),
    ({"rope_scaling": yarn(original_max_position_embeddings=1024)}, 4096),
    ({"rope_scaling": yarn(original_max_position_embeddings=4096)}, 16384),
    ({"rope_scaling": yarn()}, 16384),
    ({"rope_scaling": yarn(), "original_max_position_embeddings": 2048}, 8192),
    ({"rope_scaling": yarn(factor=None, original_max_position_embeddings=1024)}, 4096),
    ({"max_position_embeddings": 40960,
      "rope_scaling": yarn(original_max_position_embeddings=32768)}, 131072),
    ({"max_sequence_length": 2048}, 2048),
    ({"max_sequence_length": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    ({"seq_length": 1024, "n_positions": 2048}, 1024),
    ({"model_max_length": 2048}, 2048),
    ({"model_max_length": 10**30}, 4096),
    ({"seq_length": None, "max_seq_len": 0, "n_positions": "x", "seq_len": True}, 4096),
    ({"sliding_window": None}, 4096),
]  # fmt: skip


@pytest.mark.parametrize(("change", "length"), CONTEXTS, ids=lambda value: str(value)[:60])
def test_context_length(change: dict[str, object], length: int) -> None:
    assert resolve_spec({**LLAMA_2_7B, **change}).context_length == length


def test_a_window_does_not_shorten_the_context() -> None:
    assert resolve_spec(MISTRAL_7B_V01).context_length == 32768


def test_rope_scaling_added_to_a_file_of_transformers_5_keeps_its_theta() -> None:
    config = without(LLAMA_2_7B, "rope_scaling", "rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert resolve_spec({**config, "rope_scaling": yarn()}).ropes[0].theta == 5e5


def test_yarn_temperature() -> None:
    def factor(**fields: object) -> float:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        spec = resolve_spec({**LLAMA_2_7B, "rope_scaling": scaling | fields})
        return spec.ropes[0].attention_factor

    assert factor() == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert factor(attention_factor=1.5) == 1.5
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=0.5) == factor()  # transformers wants both
    assert factor(factor=None, original_max_position_embeddings=1024) == factor()  # 4096 / 1024


BAD_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2LMHeadModel.*LlamaForCausalLM"),
    ({"architectures": None, "model_type": "gpt2"}, "model_type is 'gpt2'.*llama.*mistral"),
    ({"architectures": [], "model_type": None}, "model_type is None.*without architectures"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.*SequenceClassification"),
    ({"architectures": "LlamaForCausalLM"}, "architectures.*list"),
    ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures.*exactly one"),
    ({"model_type": "mixtral"}, "model_type.*'mixtral'.*'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act.*'gelu'.*silu"),
    ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.*hqq.*unquantized"),
    ({"num_local_experts": 8}, "num_local_experts.*8.*experts"),
    ({"hidden_size": None}, "hidden_size is missing.*--hf-overrides"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": -4096}, "hidden_size is -4096"),
    ({"hidden_size": "4096"}, "hidden_size is '4096'.*integer"),
    ({"hidden_size": 4096.0}, "hidden_size is 4096.0.*integer"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 4100, "num_attention_heads": 32}, "hidden_size is 4100.*multiple.*32"),
    ({"hidden_size": 96}, "head_dim.*even"),
    ({"head_dim": 1024}, "head_dim.*512"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5.*32"),
    ({"intermediate_size": []}, "intermediate_size is \\[\\]"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'.*number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'.*true or false"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'.*bfloat16"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'.*object"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor is missing"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type is 'mrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
    ({"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "rope_scaling.mrope_section"),
    ({"rope_scaling": {"full_attention": {"type": "default"}}}, "rope_scaling.*per layer type"),
    (
        {"rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "high_freq_factor": 1.0}},  # type: ignore[dict-item]
        "rope_scaling.high_freq_factor is 1.0",
    ),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_fast"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_interleaved": True}, "rope_interleaved is True.*false"),
    ({"sliding_window": 4096}, "sliding_window.*null"),
    ({"attn_logit_softcapping": 50.0}, 'attn_logit_softcapping is 50.0.*_softcapping": null}'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS, ids=lambda value: str(value)[:50])
def test_what_we_do_not_implement_is_refused_by_name(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_spec({**LLAMA_2_7B, **change})


def test_refusals_particular_to_a_family() -> None:
    layers = {"num_hidden_layers": 2}
    with pytest.raises(UnsupportedModelError, match=r"layer_types.*'chunked_attention'"):
        types = ["full_attention", "chunked_attention"]
        resolve_spec({**QWEN3_06B, **layers, "layer_types": types})
    with pytest.raises(UnsupportedModelError, match=r"layer_types.*1 entries.*2"):
        resolve_spec({**QWEN3_06B, **layers, "layer_types": ["full_attention"]})
    with pytest.raises(UnsupportedModelError, match=r"layer_types.*one window"):
        types = ["full_attention", "sliding_attention"]
        resolve_spec({**MISTRAL_7B_V01, **layers, "layer_types": types})
    with pytest.raises(UnsupportedModelError, match="attention_bias is True"):
        resolve_spec({**MISTRAL_7B_V01, "attention_bias": True})
    with pytest.raises(UnsupportedModelError, match="use_sliding_window is 1"):
        resolve_spec({**QWEN3_06B, "use_sliding_window": 1})


def test_an_unknown_field_can_be_dropped_as_the_message_says() -> None:
    config = {**LLAMA_2_7B, "residual_scale": 0.3}
    with pytest.raises(UnsupportedModelError, match=r"residual_scale is 0.3"):
        resolve_spec(config)
    assert resolve_spec({**config, "residual_scale": None}) == resolve_spec(LLAMA_2_7B)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
CONFIGS = (LLAMA_3_1_8B, QWEN3_06B, GEMMA_2_2B, GEMMA_3_1B, PHI_4_MINI, GRANITE_3_1_2B, SMOLLM3_3B)
FIELDS = st.sampled_from(
    sorted(
        {
            *itertools.chain(*CONFIGS),
            "rope_parameters",
            "dtype",
            "sliding_window_size",
            "text_config",
        }
    )
)
ROPE_NAMES = [field.name for field in dataclasses.fields(RopeSpec)] + [
    "rope_type",
    "mscale",
    "short_factor",
]
ROPES = st.dictionaries(
    st.sampled_from(ROPE_NAMES), JSON | st.sampled_from(["yarn", "llama3", "longrope"]), max_size=4
)


@settings(max_examples=400)
@given(
    architecture=st.sampled_from(sorted({*FAMILIES, *MULTIMODAL})),
    changes=st.dictionaries(FIELDS, JSON, max_size=3),
    rope=st.none() | ROPES,
)
def test_any_json_gives_a_spec_or_a_typed_error(
    architecture: str, changes: dict[str, object], rope: dict[str, object] | None
) -> None:
    config = {
        **LLAMA_2_7B,
        "architectures": [architecture],
        "model_type": None,
        "rope_scaling": rope,
    }
    with contextlib.suppress(UnsupportedModelError):
        spec = resolve_spec(config | changes)
        assert spec.num_parameters() > 0 and len(spec.windows) == spec.num_layers

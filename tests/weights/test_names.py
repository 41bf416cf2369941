"""From published namings to the model's own; what is left out and what is refused."""

from __future__ import annotations

import re

import pytest

from quire.errors import CheckpointError
from quire.weights.names import map_names
from quire.weights.source import TensorInfo

LAYER = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight")
TRUNK = [f"layers.{i}.{part}" for i in range(3) for part in LAYER]
TRUNK += ["embed_tokens.weight", "norm.weight"]
WANTED = {"lm_head.weight", *(f"model.{name}" for name in TRUNK)}


def info(name: str, shape: tuple[int, ...] = (4,)) -> TensorInfo:
    return TensorInfo(name, "model.safetensors", shape, "float32", 0, 16)


def mapped(*names: str, **shapes: tuple[int, ...]) -> dict[str, str]:
    """wanted name -> name in the file."""
    tensors = {name: info(name, shapes.get(name, (4,))) for name in names}
    return {name: found.name for name, found in map_names(tensors, WANTED).items()}


PREFIXES = [  # the trunk's, and where the head lies
    ("model.", "lm_head.weight"),
    ("", "lm_head.weight"),
    ("transformer.", "lm_head.weight"),
    ("module.model.", "module.lm_head.weight"),
    ("module.", "module.lm_head.weight"),
    ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
    ("base_model.model.model.", "base_model.model.lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("model.text_model.", "lm_head.weight"),
    ("model.language_model.model.", "model.language_model.lm_head.weight"),
]


@pytest.mark.parametrize(("prefix", "head"), PREFIXES)
def test_one_prefix_is_found_for_the_whole_file(prefix: str, head: str) -> None:
    found = mapped(head, *(prefix + name for name in TRUNK))
    assert found == {"lm_head.weight": head} | {f"model.{n}": prefix + n for n in TRUNK}


@pytest.mark.parametrize(("prefix", "head"), PREFIXES)
def test_buffers_are_left_out_under_any_prefix(prefix: str, head: str) -> None:
    buffers = [
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq",
        f"{prefix}layers.1.self_attn.rotary_emb.cos_cached",
        f"{prefix}rotary_emb.inv_freq",
        f"{prefix}layers.0.attn.masked_bias",
        f"{prefix}layers.0.self_attn.masked_bias",
        f"{prefix}embed_positions.weights",
        f"{prefix}embed_positions",
        f"{prefix}position_ids",
        f"{prefix}layers.0.self_attn._extra_state",
    ]
    mask = f"{prefix}layers.0.attention.bias"
    found = mapped(head, *buffers, mask, *(prefix + n for n in TRUNK), **{mask: (1, 1, 8, 8)})
    assert set(found) == WANTED


def test_a_learned_bias_is_no_mask() -> None:
    bias = "model.layers.0.self_attn.bias"
    assert bias in mapped(bias, *WANTED, **{bias: (64,)})


def test_towers_of_a_multimodal_model_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="quire.weights.names")
    towers = [
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_model.transformer.layers.0.input_layernorm.weight",
        "model.visual.blocks.0.norm1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.image_newline",
        "audio_tower.conv1.weight",
        "mtp.layers.0.input_layernorm.weight",
        "mtp.norm.weight",
    ]
    found = mapped("lm_head.weight", *towers, *(f"model.language_model.{n}" for n in TRUNK))
    assert set(found) == WANTED
    [line] = [message for message in caplog.messages if "left out" in message]
    assert "vision_tower" in line and "serves the text model only" in line


TWO_MODELS = [
    [f"model.{n}" for n in TRUNK] + TRUNK,
    [f"student.model.{n}" for n in TRUNK] + [f"teacher.model.{n}" for n in TRUNK],
    [f"model.{n}" for n in TRUNK[:5]] + TRUNK[5:],
    [f"module.model.{n}" for n in TRUNK[5:]] + [f"model.{n}" for n in TRUNK[:5]],
    [f"model.{n}" for n in TRUNK] + ["lm_head.weight", "model.lm_head.weight"],
    [f"module.model.{n}" for n in TRUNK] + ["module.lm_head.weight", "lm_head.weight"],
]


@pytest.mark.parametrize("names", TWO_MODELS)
def test_a_file_with_two_namings_is_refused_with_a_name_of_each(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="two names, like") as raised:
        mapped(*names)
    sides = re.search(r"like (\S+) and (\S+);", str(raised.value))
    assert sides is not None and {*sides.groups()} <= set(names)
    assert sides[1] != sides[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A.*merge"),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", "lora_B.*adapter"),
        ("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight", "base_layer.*adapter"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save.*adapter"),
        ("model.layers.0.self_attn.q_proj.qweight", "qweight.*quantized.*unquantized"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "weight_scale_inv.*quantized"),
        ("model.layers.0.self_attn.q_proj.weight_packed", "weight_packed.*quantized"),
        ("model.layers.0.mlp.down_proj.SCB", "SCB.*quantized"),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", "quantized"),
        ("model.layers.0.mlp.down_proj.scales", "scales.*quantized"),
    ],
)
def test_adapters_and_quantized_checkpoints_are_refused_by_name(name: str, message: str) -> None:
    for others in ((), WANTED):
        with pytest.raises(CheckpointError, match=message):
            mapped(name, *others)


def test_what_is_no_model_of_this_kind_keeps_its_names() -> None:
    assert mapped("h.0.attn.c_attn.weight") == {"h.0.attn.c_attn.weight": "h.0.attn.c_attn.weight"}
    for extra in ("model.layers.3.mlp.down_proj.weight", "layers.0.mlp.down_proj.weight"):
        assert mapped(extra, *WANTED)[extra] == extra  # and is refused as unexpected

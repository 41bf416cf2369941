"""The check of an adapter's directory: what is accepted, and what is refused and how."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError, ModelError, UnsupportedModelError
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.weights.adapter import check_adapter, largest_adapter_bytes
from quire.weights.peft import read_adapter
from tests.weights.adapter_writer import PREFIX, write_adapter

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 199,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
ONES = torch.ones(4, 64)
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return resolve_spec(dict(CONFIG))


def test_what_is_known_of_it(spec: ModelSpec, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path, spec, ["q_proj", "up_proj", "embed_tokens"], ranks={"up_proj": 9}, lora_alpha=18
    )
    info = check_adapter(adapter, spec, max_rank=16)
    assert len(info.matrices) == 5 and info.max_rank == 9 and info.base_model == "base"
    assert {(m.name.rsplit(".")[-1], m.rank, m.scale) for m in info.matrices} == {
        ("q_proj", 4, 4.5), ("up_proj", 9, 2.0), ("embed_tokens", 4, 4.5),
    }  # fmt: skip
    up = info.matrices[1]
    assert (up.site, up.first, up.inputs, up.outputs) == (2, 96, 64, 96)
    assert info.key("x") == f"x@{info.content_hash}" and len(info.content_hash) == 32
    assert 0 < info.num_bytes(4) <= largest_adapter_bytes(spec, 16, 4)


def test_the_hash_is_of_config_and_tensors(spec: ModelSpec, tmp_path: Path) -> None:
    hashes = [
        check_adapter(write_adapter(tmp_path / str(i), spec, ["q_proj"], **kind), spec, max_rank=8)
        for i, kind in enumerate([{}, {}, {"seed": 1}, {"lora_alpha": 9}, {"rank": 5}])
    ]
    assert hashes[0].content_hash == hashes[1].content_hash
    assert len({info.content_hash for info in hashes}) == 4
    read, _ = read_adapter(tmp_path / "0", spec, max_rank=8, dtype=torch.float32)
    assert read == hashes[0]


def test_without_torch(spec: ModelSpec, tmp_path: Path) -> None:
    code = "import sys, quire.weights.adapter; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["norm"]}, "modules_to_save .*train without it"),
    "bias": ({"bias": "all"}, "bias is .all."),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights .*base weights"),
    "pissa with steps": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "peft_type": ({"peft_type": "IA3"}, "peft_type .*only LORA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "conv1d": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "bdlora": ({"use_bdlora": True}, "use_bdlora"),
    "moe": ({"target_parameters": ["experts"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    "tokens by name": ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token"),
    "arrow": ({"arrow_config": {"k": 1}}, "arrow_config"),
    "unknown": ({"use_magic": True}, "use_magic .*not served"),
    "number for flag": ({"use_bdlora": 0}, "use_bdlora"),
    "regex": ({"alpha_pattern": {"layers.(0|1)": 4}}, "alpha_pattern .*regular expression"),
    "long": ({"x" * 50_000: "y" * 50_000}, "not served"),
    "tied": ({"ensure_weight_tying": True, "targets": ["embed_tokens"]}, "ensure_weight_tying"),
    "rank": ({"rank": 17}, "rank 17, but .* at most 16; set --max-lora-rank 17"),
    "rank of one": ({"ranks": {"layers.1.self_attn.q_proj": 64}}, "rank 64"),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "alpha NaN": ({"lora_alpha": float("nan")}, "not valid JSON"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha is .*not a finite number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern is .*not an object"),
    "flag": ({"use_rslora": "yes"}, "use_rslora is .*not true or false"),
    "dora without m": ({"use_dora": True, "change": {f"{Q}.lora_magnitude_vector": None}}, "use_dora"),
    "m without dora": ({"change": {f"{Q}.lora_magnitude_vector": torch.ones(64)}}, "use_dora is false"),
    "no B": ({"change": {f"{Q}.lora_B.weight": None}}, "no lora_B for .*q_proj"),
    "no A": ({"change": {f"{Q}.lora_A.weight": None}}, "no lora_A"),
    "shape of A": ({"change": {f"{Q}.lora_A.weight": torch.ones(4, 63)}}, r"\[4, 63\], .*\[4, 64\]"),
    "shape of B": ({"change": {f"{Q}.lora_B.weight": torch.ones(65, 4)}}, r"needs \[64, 4\]"),
    "ranks differ": ({"change": {f"{Q}.lora_B.weight": torch.ones(64, 5)}}, r"needs \[64, 4\]"),
    "rank 0": ({"change": {f"{Q}.lora_A.weight": torch.ones(0, 64)}}, "at least 1"),
    "a vector": ({"change": {f"{Q}.lora_A.weight": torch.ones(64)}}, r"\[64\]; need"),
    "a scalar": ({"change": {f"{Q}.lora_A.weight": torch.tensor(1.0)}}, "at least 1"),
    "integers": ({"change": {f"{Q}.lora_A.weight": torch.ones(4, 64).int()}}, "int32; only"),
    "another model": (
        {"change": {f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}},
        "layers.7.* no such matrix",
    ),
    "vision tower": (
        {"change": {f"{PREFIX}model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight": ONES}},
        "vision_tower.* no such matrix",
    ),
    "two names": (
        {"change": {f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}},
        "which one is meant",
    ),
    "embedding as a linear": (
        {"change": {f"{PREFIX}model.embed_tokens.lora_A.weight": torch.ones(4, 199)}},
        "needs lora_embedding_A",
    ),
    "base weights": ({"change": {f"{Q}.base_layer.weight": torch.ones(64, 64)}}, "not the adapter's"),
    "another embedding": (
        {"targets": ["embed_tokens"],
         "change": {f"{PREFIX}model.embed_tokens.base_layer.weight": torch.ones(205, 64)}},
        r"\[205, 64\], but",
    ),
    "only an embedding's base": (
        {"targets": [], "change": {f"{PREFIX}lm_head.base_layer.weight": torch.ones(199, 64)}},
        "no lora_A for lm_head",
    ),
    "nothing": ({"targets": []}, "no tensors"),
}  # fmt: skip


def written(directory: Path, spec: ModelSpec, kind: dict[str, Any]) -> Path:
    kind = dict(kind)
    return write_adapter(directory, spec, kind.pop("targets", ["q_proj"]), **kind)


@pytest.mark.parametrize("case", [*REFUSED, *WRONG])
def test_bad_ones(case: str, spec: ModelSpec, tmp_path: Path) -> None:
    kind, message = (REFUSED | WRONG)[case]
    adapter = written(tmp_path, spec, kind)
    error = UnsupportedModelError if case in REFUSED else CheckpointError
    with pytest.raises(error, match=message) as caught:
        check_adapter(adapter, spec, max_rank=16)
    assert str(tmp_path) not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_B.bias",
        f"{PREFIX}model.norm.weight",
        f"{PREFIX}lm_head.weight",
        "x",
        f"{Q}.lora_A.default.weight",
    ],
)
def test_tensors_that_are_not_known(name: str, spec: ModelSpec, tmp_path: Path) -> None:
    """All of a file is applied, or it is refused."""
    adapter = write_adapter(tmp_path, spec, ["q_proj"], change={name: torch.ones(4)})
    with pytest.raises(UnsupportedModelError, match="not served: only lora_A") as caught:
        check_adapter(adapter, spec, max_rank=16)
    assert name in str(caught.value)


def spoiled(directory: Path, do: Callable[[Path, Path], object]) -> Path:
    do(directory / "adapter_config.json", directory / "adapter_model.safetensors")
    return directory


def to_pickle(config: Path, tensors: Path) -> None:
    tensors.rename(tensors.with_name("adapter_model.bin"))


FILES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no config": (lambda config, tensors: config.unlink(), "no adapter_config.json"),
    "no tensors": (lambda config, tensors: tensors.unlink(), "no adapter_model.safetensors"),
    "a pickle": (to_pickle, "a pickle.*safe_serialization"),
    "not JSON": (lambda config, tensors: config.write_text("{"), "not valid JSON"),
    "a list": (lambda config, tensors: config.write_text("[]"), "JSON object"),
    "deep": (lambda config, tensors: config.write_text("[" * 100_000), "not valid JSON"),
    "not text": (lambda config, tensors: config.write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "large": (lambda config, tensors: config.write_text(" " * (1 << 20) + "{}"), "larger than"),
    "not PEFT's": (lambda config, tensors: config.write_text("{}"), "no peft_type"),
    "a directory": (lambda config, tensors: (config.unlink(), config.mkdir()), "cannot be read"),
    "empty": (lambda config, tensors: tensors.write_bytes(b""), "not a complete safetensors"),
    "truncated": (lambda config, tensors: tensors.write_bytes(tensors.read_bytes()[:-1]), "not a complete"),
    "longer": (lambda config, tensors: tensors.write_bytes(tensors.read_bytes() + b"x"), "not a complete"),
    "a long header": (
        lambda config, tensors: tensors.write_bytes((17 << 20).to_bytes(8, "little") + bytes(18 << 20)),
        "17825792 bytes does not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case: str, spec: ModelSpec, tmp_path: Path) -> None:
    do, message = FILES[case]
    adapter = spoiled(write_adapter(tmp_path, spec, ["q_proj"]), do)
    with pytest.raises(ModelError, match=message) as caught:
        check_adapter(adapter, spec, max_rank=16)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_that_are_not_finite(
    value: float, half: str, spec: ModelSpec, tmp_path: Path
) -> None:
    tensor = torch.zeros((4, 64) if half == "A" else (64, 4))
    tensor[1, 3] = value
    adapter = write_adapter(tmp_path, spec, ["q_proj"], change={f"{Q}.lora_{half}.weight": tensor})
    with pytest.raises(CheckpointError, match=f"q_proj.lora_{half}.weight holds .*float16"):
        read_adapter(adapter, spec, max_rank=16, dtype=torch.float16)


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1e300,
    "",
    "LORA",
    "none",
    [],
    [1],
    {},
    {"q_proj": 2},
    "\ud800",
]


@pytest.mark.parametrize("seed", range(60))
def test_any_config_and_any_header_are_accepted_or_refused(
    seed: int, spec: ModelSpec, tmp_path: Path
) -> None:
    """Never another exception than a typed one."""
    chooser = random.Random(seed)
    adapter = write_adapter(tmp_path, spec, ["q_proj", "down_proj", "lm_head"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    for _ in range(chooser.randint(0, 3)):
        name = chooser.choice(
            [
                *config,
                "use_bdlora",
                "layer_replication",
                "".join(chooser.sample(string.printable, 5)),
            ]
        )
        config[name] = chooser.choice(VALUES)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    if seed % 2:
        for _ in range(chooser.randint(1, 6)):
            raw[chooser.randrange(length + 8)] = chooser.randrange(256)
    else:
        header = json.loads(raw[8 : 8 + length])
        for _ in range(chooser.randint(0, 3)):
            entry = header[chooser.choice(sorted(header))]
            if isinstance(entry, dict) and "shape" in entry:
                entry[chooser.choice(["shape", "dtype", "data_offsets"])] = chooser.choice(
                    [[4, 64], [64, 4], [-1], [0, 0], [2**63], "F32", "BF16", "X", None, [0, 1e300]]
                )
        text = json.dumps(header).encode()
        raw = bytearray(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    path.write_bytes(raw)
    try:
        info, tensors = read_adapter(adapter, spec, max_rank=16, dtype=torch.float32)
    except ModelError:
        return
    assert len(tensors) == len(info.matrices)


def test_bases_of_other_names(spec: ModelSpec, tmp_path: Path) -> None:
    """Of a base model without a head, and of a text model inside another one."""
    adapter = write_adapter(tmp_path, spec, ["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for prefix in ("", "model.language_model.", "language_model.model."):
        renamed = {
            name.replace(f"{PREFIX}model.", f"{PREFIX}{prefix}"): tensor
            for name, tensor in tensors.items()
        }
        save_file(renamed, adapter / "adapter_model.safetensors")
        names = [matrix.name for matrix in check_adapter(adapter, spec, max_rank=16).matrices]
        assert names == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]

"""`quire quantize`: the files that it writes, bit by bit. That compressed-tensors and transformers read them
is proved by tests/quantization/verify_written.py, in an environment that has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantization.verify_written import SCHEMES

from quire.builtin import MODEL_DIR
from quire.cli.main import main
from quire.cli.quantize import write
from quire.cli.quantize.compare import compare
from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import dequantize
from quire.quantization.rounding import quantize

ORIGINAL = load_file(MODEL_DIR / "model.safetensors")
SHORT = ("--skip-comparison",)
CONFIG = {  # as compressed-tensors 0.20.1 dumps it
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "group_size": 64,
                "strategy": "group",
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    },
    "quant_method": "compressed-tensors",
    "kv_cache_scheme": None,
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
}


def run(out: Path, *flags: str, model: str = "quire-builtin") -> int:
    return main(["quantize", model, str(out), *flags, *SHORT])


def config_of(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "config.json").read_text())
    return loaded


def unpacked(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Bit by bit: [N, words] int32 -> [N, width]."""
    stream = np.unpackbits(words.contiguous().view(torch.uint8).numpy(), axis=1, bitorder="little")
    each = stream[:, : width * bits].reshape(-1, bits)
    codes = np.packbits(each, axis=1, bitorder="little")
    return torch.from_numpy(codes).view(-1, width).int()


def weight_of(tensors: dict[str, torch.Tensor], name: str, form: CodeFormat) -> torch.Tensor:
    scale = tensors[f"{name}_scale"]
    if form.float8:
        return tensors[name].float() * scale.float()
    rows, width = tensors[f"{name}_shape"].tolist()
    codes = unpacked(tensors[f"{name}_packed"], form.bits, width)
    zero = torch.tensor(1 << (form.bits - 1)).expand(scale.shape)
    if form.offset == "zero":
        zero = unpacked(tensors[f"{name}_zero_point"].T, form.bits, rows).T
    group = width // scale.shape[1]
    spread = [each.repeat_interleave(group, 1).float() for each in (zero, scale)]
    return (codes - spread[0]) * spread[1]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(name: str, tmp_path: Path) -> None:
    flags, form, has_head = SCHEMES[name]
    assert run(tmp_path / "out", *flags.split()) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    read = set()
    for key, original in ORIGINAL.items():
        if key.endswith("proj.weight"):
            expected = dequantize(form, *quantize(original, form))
            assert torch.equal(weight_of(tensors, key, form), expected), key
            read |= {other for other in tensors if other.startswith(key)}
        else:
            assert torch.equal(tensors[key], original), key
            read.add(key)
    if has_head:
        head = CodeFormat(bits=8, scale="bfloat16", zero=128)
        expected = dequantize(head, *quantize(ORIGINAL["model.embed_tokens.weight"], head))
        assert torch.equal(weight_of(tensors, "lm_head.weight", head), expected)
        read |= {other for other in tensors if other.startswith("lm_head.")}
    assert read == set(tensors)
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is not has_head
    assert config["quantization_config"]["ignore"] == ([] if has_head else ["lm_head"])
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (MODEL_DIR / file).read_bytes()


def test_the_config_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--scheme", "w4a16") == 0
    config = config_of(tmp_path / "a")
    assert config.pop("quantization_config") == CONFIG
    assert config == json.loads((MODEL_DIR / "config.json").read_text())
    assert run(tmp_path / "b", "--scheme", "fp8", "--head", "w8") == 0
    groups = config_of(tmp_path / "b")["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["re:.*lm_head$"], ["Linear"]]
    assert groups["group_1"]["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "token",
        "dynamic": True,
    }


def test_layers_that_are_left_out(tmp_path: Path) -> None:
    flags = ("--scheme", "w4a16", "--ignore", r"layers\.0\.", "--ignore", "down_proj$")
    assert run(tmp_path / "out", *flags) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    kept = [f"{name}.weight" for name in ignored if name != "lm_head"]
    assert len(kept) == 7 + 7 and "model.layers.3.mlp.down_proj.weight" in kept
    for key, original in ORIGINAL.items():
        assert (key in tensors) == (not key.endswith("proj.weight") or key in kept)
        assert key not in tensors or torch.equal(tensors[key], original)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "whole", "--scheme", "w8a16") == 0
    monkeypatch.setattr(write, "SHARD_BYTES", 600_000)
    assert run(tmp_path / "parts", "--scheme", "w8a16") == 0
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 4
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        found = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(
            found
        )
        assert len(found) <= 3 or file.stat().st_size < 620_000
        parts |= found
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_dry_run_prints_sizes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--scheme", "w4a16", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    planned = capsys.readouterr().out
    assert "56 of 57 matrices" in planned and "7.87 MB" in planned
    assert run(tmp_path / "out", "--scheme", "w4a16") == 0
    assert capsys.readouterr().out.startswith(planned)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{sum(t.nbytes for t in tensors.values()) / 1e6:.2f} MB" in planned


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scheme w4a16 --group-size 128", "divide the 192 inputs of .*; use 64"),
        ("--scheme w4a16 --group-size 12", "multiple of 8"),
        ("--scheme fp8 --asym", "fp8 is symmetric"),
        ("--scheme w4a16 --ignore gate", None),
        ("--scheme w4a16 --ignore experts", "matches no layer.*model.layers.0"),
        ("--scheme w4a16 --ignore *", "no regular expression"),
    ],
)
def test_choices_that_do_not_fit(
    flags: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tmp_path / "out", *flags.split(), "--dry-run")
    error = capsys.readouterr().err.replace("\n", " ")
    assert code == (0 if message is None else 2), error
    if message is not None:
        import re

        assert re.search(message, error), error


def test_what_is_not_overwritten_and_what_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert run(tmp_path / "full", "--scheme", "fp8") == 2
    assert "new or empty" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(MODEL_DIR, copy)
    broken = {k: v.clone() for k, v in ORIGINAL.items()}
    broken["model.layers.2.self_attn.o_proj.weight"][7, 7] = torch.inf
    save_file(broken, copy / "model.safetensors")
    assert run(tmp_path / "out", "--scheme", "w4a16", model=str(copy)) == 2
    assert "layers.2.self_attn.o_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_file(
        {k.removeprefix("model."): v for k, v in ORIGINAL.items()}, copy / "model.safetensors"
    )
    assert run(tmp_path / "out", "--scheme", "w4a16", model=str(copy)) == 2
    assert "lacks tensor model.layers.0" in capsys.readouterr().err


def test_a_model_of_its_own_head_and_float16(tmp_path: Path) -> None:
    """The head stays as it is, and scales have the weights' dtype."""
    copy = tmp_path / "copy"
    shutil.copytree(MODEL_DIR, copy)
    tensors = {k: v.half() for k, v in ORIGINAL.items()}
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        copy / "model.safetensors",
    )
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert run(tmp_path / "out", "--scheme", "w4a16", model=str(copy)) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mlp.up_proj.weight_scale"].dtype is torch.float16
    assert torch.equal(written["lm_head.weight"], tensors["model.embed_tokens.weight"] * 2)
    assert run(tmp_path / "head", "--scheme", "w4a16", "--head", "w8", model=str(copy)) == 0
    written = load_file(tmp_path / "head" / "model.safetensors")
    assert "lm_head.weight" not in written and written["lm_head.weight_packed"].shape == (4096, 48)


def test_what_it_cost_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "quire-builtin", str(tmp_path / "out"), "--scheme", "w8a16"]) == 0
    printed = dict(
        line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line
    )
    assert 2e-4 < float(printed["KL divergence"]) < 9e-4
    assert 97 < float(printed["same top-1"].rstrip("%")) < 100


def test_a_quantized_model_is_not_quantized_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "once", "--scheme", "fp8") == 0
    assert run(tmp_path / "twice", "--scheme", "w4a16", model=str(tmp_path / "once")) == 2
    assert "quantized already" in capsys.readouterr().err


def test_models_are_compared_on_the_text(tmp_path: Path) -> None:
    same = compare(MODEL_DIR, MODEL_DIR, "def add(a, b):\n    return a + b\n" * 40)
    assert same.kl == 0 and same.top1 == 1 and same.perplexity == same.original_perplexity
    assert same.num_tokens > 256
    copy = tmp_path / "copy"
    shutil.copytree(MODEL_DIR, copy)
    noisy = {k: v + 0.02 * torch.randn_like(v) for k, v in ORIGINAL.items()}
    save_file(noisy, copy / "model.safetensors")
    other = compare(MODEL_DIR, copy, "The weather in the mountains changes quickly.")
    assert other.kl > 0.01 and other.perplexity != other.original_perplexity

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quire.builtin import MODEL_DIR
from quire.config import from_flat
from quire.engine.setup import locate, resolve
from quire.kvtransfer.fingerprint import Fingerprint, fingerprint_of
from quire.models.spec import ModelSpec
from quire.weights.source import open_source


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path_factory.mktemp("models") / "model"))


def of(path: Path, numerics: str = "x", rank: int | None = None, **options: object) -> Fingerprint:
    config = locate(from_flat({"model": str(path), "device": "cpu", **options}))
    resolved = resolve(config)
    model: ModelSpec = resolved.spec
    if rank is not None:
        model = model.divided(rank, 2)
    return fingerprint_of(
        config,
        model,
        resolved.model_dir,
        dtype=resolved.dtype,
        kv_cache_dtype=resolved.kv_cache_dtype,
        numerics=numerics,
    )


def test_equal_for_a_copy_elsewhere_and_for_every_rank(model_dir: Path) -> None:
    first = of(model_dir)
    assert len(first.model) == len(first.local) == 32
    assert of(MODEL_DIR).model == first.model
    assert of(model_dir, rank=0) == of(model_dir, rank=1) == first


def test_options_that_change_no_kv_change_nothing(model_dir: Path) -> None:
    options = {"max_num_seqs": 3, "swap_space": 0.1, "tensor_parallel_size": 2, "seed": 7}
    assert of(model_dir, **options) == of(model_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"numerics": "y"},
        {"dtype": "float32"},
        {"kv_cache_dtype": "fp8"},
        {"quantization": "int8"},
        {"block_size": 32},
        {"cpu_activation_bits": 8},
        {"load_format": "dummy"},
        {"hf_overrides": {"rope_theta": 5000.0}},
        {
            "hf_overrides": {
                "sliding_window": 64,
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
            }
        },
    ],
    ids=str,
)
def test_options_that_change_kv(model_dir: Path, change: dict[str, object]) -> None:
    assert of(model_dir, **change).model != of(model_dir).model  # type: ignore[arg-type]


def test_dummy_weights_are_known_by_their_seed(model_dir: Path) -> None:
    dummy = of(model_dir, load_format="dummy")
    assert dummy == of(model_dir, load_format="dummy")
    assert dummy.model != of(model_dir, load_format="dummy", seed=1).model


def test_every_tensor_counts(tmp_path: Path) -> None:
    """A model that was trained on differs in most numbers of a tensor, here in all of one, by one bit."""
    copy = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    first, file = of(copy), copy / "model.safetensors"
    with open_source(copy).open() as checkpoint:
        tensors = list(checkpoint.tensors.values())
    content = file.read_bytes()
    for info in tensors:
        changed = bytearray(content)
        end = info.begin + info.num_bytes
        changed[info.begin : end] = bytes(byte ^ 1 for byte in content[info.begin : end])
        file.write_bytes(changed)
        assert of(copy).model != first.model, info.name
    file.write_bytes(content)
    assert of(copy).model == first.model


def test_a_file_that_was_written_to_is_another_one_on_this_machine(model_dir: Path) -> None:
    first = of(model_dir)
    os.utime(model_dir / "model.safetensors", ns=(1, 1))
    assert of(model_dir).model == first.model
    assert of(model_dir).local != first.local
    # its tokenizer may change: blocks are named by token ids
    (model_dir / "tokenizer.json").write_text(json.dumps({}))
    assert of(model_dir).local != first.local


def test_the_order_of_fields_in_a_file_does_not_matter(model_dir: Path) -> None:
    first, path = of(model_dir), model_dir / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(fields.items()))))
    assert of(model_dir) == first

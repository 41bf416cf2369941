"""Checkpoint files: single, sharded, several without an index, and every way they can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.errors import CheckpointError
from quire.weights.files import INDEX_FILE, SINGLE_FILE
from quire.weights.safetensors import SafetensorsCheckpoint
from tests.weights.reading import read_tensor

A, B = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.bfloat16)


def shard(directory: Path, **files: dict[str, torch.Tensor]) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")


def index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_single_file(tmp_path: Path) -> None:
    shard(tmp_path, model={"a": A, "b": B})
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].shape == (2, 3)
        assert checkpoint.tensors["b"].dtype == "bfloat16"
        assert torch.equal(read_tensor(checkpoint, "a"), A)
        assert torch.equal(read_tensor(checkpoint, "b"), B)


def test_sharded_through_the_index(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A, "stray": B}, two={"b": B, "a": A + 1}, unused={"a": A})
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}  # the index decides, not what else lies there
        assert torch.equal(read_tensor(checkpoint, "a"), A)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A}, two={"b": B}, consolidated={"a": A})
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A}, two={"a": A})
    with pytest.raises(CheckpointError, match=r"tensor a is in both one.safetensors and two"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    shard(tmp_path, model={"a": A, "b": B})
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors \(\d+ bytes\) is not a complete"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="Git LFS"):
        SafetensorsCheckpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A})
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors, which is not in"):
        SafetensorsCheckpoint(tmp_path)


def test_index_naming_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A})
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor b in one\.safetensors, which does not hold"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..", "a.bin", 3]
)
def test_index_may_not_leave_the_directory(tmp_path: Path, file: object) -> None:
    (tmp_path / "model").mkdir()
    shard(tmp_path, one={"a": A})
    index(tmp_path / "model", {"a": file})
    with pytest.raises(CheckpointError, match="beside the index"):
        SafetensorsCheckpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": []}', "{}", "[" * 100_000, "\ufeff{}"]
)
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="download it again"):
        SafetensorsCheckpoint(tmp_path)


def test_symlinked_shards_are_fine(tmp_path: Path) -> None:
    """The hub's cache is links to blobs elsewhere; what counts is the name, not where the link leads."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    shard(blobs, x={"a": A})
    (snapshot / SINGLE_FILE).symlink_to(blobs / "x.safetensors")
    with SafetensorsCheckpoint(snapshot) as checkpoint:
        assert torch.equal(read_tensor(checkpoint, "a"), A)


def test_pickles_are_not_an_alternative(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled.*convert"):
        SafetensorsCheckpoint(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def files(directory: Path) -> set[str]:
    with SafetensorsCheckpoint(directory) as checkpoint:
        return {info.file.removesuffix(".safetensors") for info in checkpoint.tensors.values()}


def test_what_lies_beside_the_model_is_not_read(tmp_path: Path) -> None:
    extras: dict[str, dict[str, torch.Tensor]] = {
        "consolidated": {"a": A}, "consolidated.00": {"a": A}, "adapter_model": {"lora": A},
        "optimizer": {"a": A}, "random_states_0": {"a": A},
    }  # fmt: skip
    shard(
        tmp_path, **extras, **{"model-00001-of-00002": {"a": A}, "model-00002-of-00002": {"b": B}}
    )
    assert files(tmp_path) == {"model-00001-of-00002", "model-00002-of-00002"}
    shard(tmp_path, other={"a": A})  # complete shards need nothing else
    assert files(tmp_path) == {"model-00001-of-00002", "model-00002-of-00002"}
    shard(tmp_path, model={"a": A, "b": B})  # one file wins over shards, as in transformers
    index(tmp_path, {"a": "other.safetensors"})
    assert files(tmp_path) == {"model"}


def test_shards_without_an_index_must_be_complete(tmp_path: Path) -> None:
    shard(tmp_path, **{"model-00001-of-00003": {"a": A}, "model-00003-of-00003": {"b": B}})
    with pytest.raises(
        CheckpointError, match=r"2 of 00003.*model-00002-of-00003\.safetensors is mi"
    ):
        SafetensorsCheckpoint(tmp_path)


def test_two_sets_of_shards_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, **{"x-1-of-1": {"a": A}, "y-1-of-2": {"a": A}, "y-2-of-2": {"b": B}})
    with pytest.raises(CheckpointError, match=r"several sets of shards.*x-1-of-1"):
        SafetensorsCheckpoint(tmp_path)
    shard(tmp_path, **{"model-1-of-1": {"a": A}})
    assert files(tmp_path) == {"model-1-of-1"}


@pytest.mark.parametrize(
    ("file", "message"),
    [("adapter_model", "adapter.*merge"), ("consolidated", "Mistral's own naming")],
)
def test_only_something_else_is_named(tmp_path: Path, file: str, message: str) -> None:
    shard(tmp_path, **{file: {"a": A}})
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_may_name_a_tied_head_that_was_not_saved(tmp_path: Path) -> None:
    shard(tmp_path, one={"a": A})
    index(tmp_path, {"a": "one.safetensors", "lm_head.weight": "one.safetensors"})
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a"}

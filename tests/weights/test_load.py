"""Streaming tensors to their targets: everything is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quire.errors import CheckpointError
from quire.layers.parameter import WeightTarget
from quire.weights import pieces
from quire.weights.load import load_random_weights, load_weights
from quire.weights.safetensors import SafetensorsCheckpoint
from quire.weights.source import Checkpoint, TensorInfo
from tests.weights.reading import read_tensor


class Recorder:
    """Targets that copy what they are given, and remember it and how often each row came."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.times: dict[str, torch.Tensor] = {}
        self.targets = [self.target(name, shape) for name, shape in shapes.items()]

    def target(self, name: str, shape: tuple[int, ...]) -> WeightTarget:
        def load(first: int, rows: torch.Tensor) -> None:
            assert rows.is_contiguous() and rows.shape[1:] == shape[1:]
            with lock:
                if name not in self.loaded:
                    self.loaded[name] = torch.zeros(shape, dtype=rows.dtype)
                    self.times[name] = torch.zeros(shape[0], dtype=torch.int64)
            self.loaded[name][first : first + len(rows)] = rows
            self.times[name][first : first + len(rows)] += 1

        lock = threading.Lock()

        kind = "norm" if "norm" in name else "bias" if "bias" in name else "weight"
        return WeightTarget(name=name, shape=shape, load=load, kind=kind)

    def assert_each_row_came_once(self) -> None:
        assert set(self.times) == {target.name for target in self.targets}
        assert all(times.eq(1).all() for times in self.times.values())


def checkpoint(directory: Path, **tensors: torch.Tensor) -> SafetensorsCheckpoint:
    save_file(tensors, directory / "model.safetensors")
    return SafetensorsCheckpoint(directory)


def test_each_tensor_reaches_its_target(tmp_path: Path) -> None:
    recorder = Recorder(a=(2, 3), b=(4,))
    a, b = torch.randn(2, 3), torch.randn(4)
    with checkpoint(tmp_path, a=a, b=b) as source:
        load_weights(recorder.targets, source, dtype=torch.float32)
    assert torch.equal(recorder.loaded["a"], a) and torch.equal(recorder.loaded["b"], b)


def test_a_tensor_with_two_targets_reaches_both(tmp_path: Path) -> None:
    first, second = Recorder(a=(3,)), Recorder(a=(3,))
    with checkpoint(tmp_path, a=torch.ones(3)) as source:
        load_weights([*first.targets, *second.targets], source, dtype=torch.float32)
    assert torch.equal(first.loaded["a"], second.loaded["a"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2, 3)}, "lacks tensor b"),
        ({"a": torch.ones(3, 2), "b": torch.ones(4)}, r"tensor a .*\[3, 2\].*\[2, 3\]"),
        ({"a": torch.ones(6), "b": torch.ones(4)}, r"tensor a .*\[6\].*\[2, 3\]"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, "tensor b .*int8.*unquantized"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4), "lora": torch.ones(1)}, "has tensor lora"),
    ],
)  # fmt: skip
def test_mismatch_is_reported_before_anything_is_loaded(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    recorder = Recorder(a=(2, 3), b=(4,))
    with checkpoint(tmp_path, **tensors) as source, pytest.raises(CheckpointError, match=message):
        load_weights(recorder.targets, source, dtype=torch.float32)
    assert not recorder.loaded


@contextmanager
def piece_bytes(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", size)
        patch.setattr(pieces, "ROW_STEP", 1)
        yield


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.sampled_from(["a", "b", "norm", "bias"]),
        st.tuples(st.integers(1, 40)) | st.tuples(st.integers(1, 40), st.integers(1, 9)),
        min_size=1,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 4),
    size=st.integers(1, 200),
)
def test_whatever_the_pieces_and_threads_every_row_comes_once(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    threads: int,
    size: int,
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    recorder, done = Recorder(**shapes), []
    with piece_bytes(size), checkpoint(tmp_path, **tensors) as source:
        wanted = [(source.tensors[target.name], [target]) for target in recorder.targets]
        pieces.load_pieces(wanted, source, threads=threads, progress=done.append)
        assert sum(done) == sum(info.num_bytes for info in source.tensors.values())
    recorder.assert_each_row_came_once()
    for name, tensor in tensors.items():
        assert torch.equal(recorder.loaded[name], tensor)


def test_an_empty_tensor_has_no_pieces(tmp_path: Path) -> None:
    recorder = Recorder(a=(0, 3))
    with checkpoint(tmp_path, a=torch.ones(0, 3)) as source:
        load_weights(recorder.targets, source, dtype=torch.float32)
    assert not recorder.loaded


def load_one(target: WeightTarget, source: Checkpoint, threads: int) -> None:
    wanted = [(source.tensors[target.name], [target])]
    pieces.load_pieces(wanted, source, threads=threads, progress=lambda n: None)


def test_only_rows_that_somebody_takes_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(400.0).view(100, 4)
    given: dict[str, torch.Tensor] = {}

    def target(key: str, rows: range, columns: range) -> WeightTarget:
        given[key] = torch.full((len(rows), len(columns)), -1.0)

        def load(first: int, part: torch.Tensor) -> None:
            assert part.is_contiguous()
            given[key][first : first + len(part)] = part

        return WeightTarget("a", (100, 4), load, taken=(rows, columns))

    targets = [
        target("x", range(10, 40), range(4)),
        target("y", range(30, 60), range(1, 3)),
        target("none", range(0), range(4)),
    ]
    with piece_bytes(100), checkpoint(tmp_path, a=tensor) as source:
        read: list[int] = []
        pieces.load_pieces(
            [(source.tensors["a"], targets)], source, threads=2, progress=read.append
        )
    assert torch.equal(given["x"], tensor[10:40])
    assert torch.equal(given["y"], tensor[30:60, 1:3])
    assert sum(read) == 50 * 16


class Blocks:
    """A checkpoint of one tensor, in blocks of 8 elements that take 5 bytes."""

    def __init__(self, rows: int, blocks: int) -> None:
        self.data = bytes(i % 251 for i in range(rows * blocks * 5))
        size = len(self.data)
        self.tensors = {"a": TensorInfo("a", "file", (rows, blocks * 8), "blocks", 0, size)}

    def read(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        into[:] = self.data[begin : begin + len(into)]

    def check_unchanged(self) -> None:
        pass

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_rows_of_a_type_that_pytorch_lacks_come_as_bytes() -> None:
    source = Blocks(rows=7, blocks=3)
    loaded = torch.zeros(7, 15, dtype=torch.uint8)

    def load(first: int, rows: torch.Tensor) -> None:
        loaded[first : first + len(rows)] = rows

    target = WeightTarget("a", (7, 24), load, dtypes=("blocks",))
    with piece_bytes(20):
        load_weights([target], source, dtype=torch.float32)
    assert bytes(loaded.view(-1).tolist()) == source.data
    other = dataclasses.replace(target, dtypes=("int4",))
    with pytest.raises(CheckpointError, match=r"dtype blocks, but config\.json makes it int4"):
        load_weights([other], source, dtype=torch.float32)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_target_that_fails_ends_the_loading(tmp_path: Path, threads: int) -> None:
    loaded = []

    def load(first: int, rows: torch.Tensor) -> None:
        loaded.append(first)
        raise ValueError("no")

    target = WeightTarget(name="a", shape=(1000, 4), load=load)
    with piece_bytes(16), checkpoint(tmp_path, a=torch.ones(1000, 4)) as source:
        with pytest.raises(ValueError, match="no"):
            load_one(target, source, threads)
    assert len(loaded) <= threads


def loading_while(tmp_path: Path, happens: Callable[[Path], None], threads: int) -> None:
    """Load 1000 rows; after the first piece, something happens to the file."""
    once = threading.Lock()

    def load(first: int, rows: torch.Tensor) -> None:
        if once.acquire(blocking=False):
            happens(tmp_path / "model.safetensors")

    target = WeightTarget(name="a", shape=(1000, 4), load=load)
    with piece_bytes(16), checkpoint(tmp_path, a=torch.ones(1000, 4)) as source:
        load_one(target, source, threads)
        source.check_unchanged()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_cut_short_while_it_is_read(tmp_path: Path, threads: int) -> None:
    """Of a mapped file this would be SIGBUS."""
    with pytest.raises(CheckpointError, match=r"model\.safetensors has become shorter"):
        loading_while(tmp_path, lambda path: os.truncate(path, 8000), threads)


def test_a_file_written_to_while_it_is_read(tmp_path: Path) -> None:
    def overwrite(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # however coarse the clock is

    with pytest.raises(CheckpointError, match="was written to while it was loaded"):
        loading_while(tmp_path, overwrite, 1)


def test_a_file_replaced_while_it_is_read_is_still_the_old_one(tmp_path: Path) -> None:
    def replace(path: Path) -> None:
        path.with_suffix(".new").write_bytes(b"another model")
        os.replace(path.with_suffix(".new"), path)

    loading_while(tmp_path, replace, 1)


def test_a_disk_that_fails_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        def preadv(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", preadv)

    with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error"):
        loading_while(tmp_path, fail, 1)


def test_reads_that_give_less_than_asked_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    tensor = torch.randn(50, 3)
    with checkpoint(tmp_path, a=tensor) as source:
        monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:7]], at))
        assert torch.equal(read_tensor(source, "a"), tensor)


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    recorder = Recorder(a=(1,))
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extras = {inv_freq: torch.ones(4), "lm_head.weight": torch.ones(2)}
    with checkpoint(tmp_path, a=torch.ones(1), **extras) as source:
        load_weights(recorder.targets, source, dtype=torch.float32, tied={"a": "lm_head.weight"})
    assert set(recorder.loaded) == {"a"}


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    def weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        recorder = Recorder(**shapes)
        load_random_weights(recorder.targets, dtype=torch.float32, seed=seed)
        return recorder.loaded

    first = weights(1, a=(64, 64), b=(64, 64), norm=(8,), bias=(8,))
    assert torch.equal(first["a"], weights(1, a=(64, 64))["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], weights(2, a=(64, 64))["a"])
    assert first["a"].std() == pytest.approx(0.02, rel=0.1)
    assert first["norm"].eq(1).all() and first["bias"].eq(0).all()

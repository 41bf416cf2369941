"""What `CudaDevice` asks of PyTorch, with a stand-in for the GPU: what would go wrong shows on none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire.runner.device import CannotRecordError, CudaDevice

MIB = 1 << 20


class FakeCuda:
    """The calls that `CudaDevice` makes: streams are numbers, of which the current one is kept."""

    def __init__(self) -> None:
        self.current = 0
        self.streams = 0
        self.pools: list[int] = []
        self.live: dict[int, int] = {}
        """Graphs by pool; a pool whose last graph is gone may not be used again."""
        self.dead: set[int] = set()
        self.captures: list[dict[str, Any]] = []
        self.fails: Exception | None = None
        self.lost = False
        self.free = 1000 * MIB
        self.calls: list[str] = []

    def Stream(self, device: object) -> int:
        self.streams += 1
        return self.streams

    def current_stream(self, device: object = None) -> int:
        return self.current

    def set_stream(self, stream: int) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def graph_pool_handle(self) -> int:
        self.pools.append(len(self.pools))
        return self.pools[-1]

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: object, **options: Any) -> Iterator[None]:
        assert options["pool"] not in self.dead, "use_count > 0 INTERNAL ASSERT FAILED"
        self.captures.append(options)
        self.current = options["stream"]
        yield  # as PyTorch's: if the end of the capture fails, the stream is not restored
        if self.fails is not None:
            raise self.fails
        self.live[options["pool"]] = self.live.get(options["pool"], 0) + 1
        self.current = self.captures[0].get("before", 0)

    def synchronize(self, device: object = None) -> None:
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def drop_graphs(self) -> None:
        self.dead |= set(self.live)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return self.free, 2000 * MIB


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    for name in (
        *("Stream", "current_stream", "set_stream", "stream", "graph_pool_handle", "CUDAGraph"),
        *("graph", "synchronize", "empty_cache", "mem_get_info"),
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    clear = lambda: cuda.calls.append("clear workspaces")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    return cuda


def test_steps_go_to_a_stream_of_the_devices_own(cuda: FakeCuda) -> None:
    cuda.current = 77  # the caller's
    device = CudaDevice()
    with device.active():
        inside = cuda.current
    assert inside not in (0, 77) and cuda.current == 77
    with device.active():
        assert cuda.current == inside


def test_each_device_captures_on_its_own_stream_and_other_threads_may_go_on(cuda: FakeCuda) -> None:
    devices = [CudaDevice(), CudaDevice()]
    for device in devices:
        device.record(lambda: None)
    streams = [capture["stream"] for capture in cuda.captures]
    assert None not in streams and streams[0] != streams[1]
    assert {capture["capture_error_mode"] for capture in cuda.captures} == {"thread_local"}


def test_recordings_after_waking_share_nothing_with_those_before(cuda: FakeCuda) -> None:
    device = CudaDevice()
    device.record(lambda: None)
    device.record(lambda: None)
    assert len({(c["pool"], c["stream"]) for c in cuda.captures}) == 1
    cuda.drop_graphs()
    cuda.calls.clear()
    device.release()
    assert cuda.calls == ["clear workspaces", "empty_cache"]
    device.record(lambda: None)
    first, *_, last = cuda.captures
    assert first["pool"] != last["pool"] and first["stream"] != last["stream"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("operation failed due to a previous error during capture"),
    ],
)
def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda: FakeCuda, error: Exception) -> None:
    device = CudaDevice()
    cuda.fails = error
    with device.active():
        steps = cuda.current
        with pytest.raises(CannotRecordError):
            device.record(lambda: None)
        assert cuda.current == steps


def test_a_lost_device_is_more_than_a_failed_capture(cuda: FakeCuda) -> None:
    device = CudaDevice()
    cuda.fails, cuda.lost = RuntimeError("failed"), True
    with pytest.raises(torch.AcceleratorError):
        device.record(lambda: None)


def test_recording_leaves_room_for_the_largest_step(cuda: FakeCuda) -> None:
    device = CudaDevice()
    device.keep_free(300 * MIB)
    cuda.free = 301 * MIB
    device.record(lambda: None)
    cuda.free = 299 * MIB
    with pytest.raises(CannotRecordError, match="299 MiB"):
        device.record(lambda: None)
    assert len(cuda.captures) == 1


@pytest.mark.parametrize(("cores", "blocks"), [(2, True), (4, True), (16, False)])
def test_a_wait_leaves_the_core_to_others_if_there_are_few(
    cuda: FakeCuda, cores: int, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    events: list[bool] = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda blocking=False: events.append(blocking) or event
    )
    device = CudaDevice()
    monkeypatch.setattr(device, "_copies", SimpleNamespace(wait_stream=lambda stream: None))
    assert list(device.download([]).wait()) == []
    assert events == [blocks]

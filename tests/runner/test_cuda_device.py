"""What `CudaDevice` asks of PyTorch, with a stand-in for the GPU: what would go wrong shows on none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from quire.runner import staging
from quire.runner.device import CannotRecordError, CudaDevice

MIB = 1 << 20


class FakeEvent:
    def __init__(self, cuda: FakeCuda, blocking: bool) -> None:
        self.cuda, self.blocking = cuda, blocking
        self.recorded_on: int | None = None

    def record(self) -> None:
        self.recorded_on = self.cuda.current

    def query(self) -> bool:
        return self.cuda.copied

    def synchronize(self) -> None:
        assert self.recorded_on is not None


class FakeStream(int):
    waits: ClassVar[list[tuple[int, int | None]]] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append((int(self), event.recorded_on))


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
        self.events: list[FakeEvent] = []
        self.pinned: list[torch.Tensor] = []
        self.copied = True
        """Whether the device has carried out all copies."""

    def Event(self, blocking: bool = False) -> FakeEvent:
        self.events.append(FakeEvent(self, blocking))
        return self.events[-1]

    def page_locked(self, size: int) -> torch.Tensor:
        self.pinned.append(torch.zeros(size, dtype=torch.uint8))
        return self.pinned[-1]

    def Stream(self, device: object) -> int:
        self.streams += 1
        return FakeStream(self.streams)

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
        *("graph", "synchronize", "empty_cache", "mem_get_info", "Event"),
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(staging, "page_locked", cuda.page_locked)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
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
    assert list(CudaDevice().download([]).wait()) == []
    assert {event.blocking for event in cuda.events} == {blocks}


def step(device: CudaDevice, value: int) -> Any:
    """A step's two copies, with the steps' stream current. Returns the download."""
    with device.active():
        target = torch.zeros(3, dtype=torch.int32)
        device.upload(target, torch.full((3,), value, dtype=torch.int32))
        return device.download([target, torch.tensor([value], dtype=torch.int64), target.bool()])


def test_steady_steps_use_page_locked_memory_and_events_again(cuda: FakeCuda) -> None:
    device, running = CudaDevice(), []
    for value in range(40):
        running.append(step(device, value))
        if value == 10:
            made = len(cuda.pinned), len(cuda.events)
        if len(running) == 2:
            found = running.pop(0).wait()
            assert [each.tolist() for each in found] == [
                [value - 1] * 3,
                [value - 1],
                [value > 1] * 3,
            ]
    assert (len(cuda.pinned), len(cuda.events)) == made
    assert made[0] <= 4


def test_what_was_fetched_stays_as_it_is(cuda: FakeCuda) -> None:
    device = CudaDevice()
    first = step(device, 5).wait()
    for value in range(20):
        step(device, value).wait()
    assert first[0].tolist() == [5, 5, 5]


def test_a_piece_is_not_written_before_the_device_has_read_it(cuda: FakeCuda) -> None:
    device = CudaDevice()
    cuda.copied = False
    sources = [torch.full((4,), value, dtype=torch.int32) for value in range(40)]
    with device.active():
        for source in sources:
            device.upload(torch.zeros_like(source), source)
    held = [piece[:16].view(torch.int32).tolist() for piece in cuda.pinned]
    assert held == [source.tolist() for source in sources]


def test_large_copies_have_memory_of_their_own(cuda: FakeCuda) -> None:
    device, large = CudaDevice(), torch.arange(staging.PIECE_BYTES, dtype=torch.int16)
    target = torch.zeros_like(large)
    with device.active():
        for _ in range(2):
            device.upload(target, large)
            (back,) = device.download([large]).wait()
            assert torch.equal(back, large) and torch.equal(target, large)
    assert [len(piece) for piece in cuda.pinned] == [large.nbytes] * 4


def test_results_are_copied_after_what_computes_them(cuda: FakeCuda) -> None:
    device = CudaDevice()
    FakeStream.waits.clear()
    with device.active():
        steps = cuda.current
        device.download([torch.zeros(1)])
    [(waiting, after)] = FakeStream.waits
    assert after == steps != waiting

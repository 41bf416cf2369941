"""The operations of an accelerator: asynchronous copies, and CUDA graphs.

`CudaDevice` is the real one. `HostDevice` does the same synchronously on the CPU: it is used to test the
runner's control flow with interpreted kernels, on machines without a GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quire.runner.footprint import DeviceMemory, host_memory
from quire.runner.staging import Piece, Pieces

Result = TypeVar("Result")
FEW_CORES = 4
"""With at most so many, the front end and the host's part of steps need the core that a wait would take."""


class CannotRecordError(Exception):
    """A graph could not be captured: there is no memory, or the device refused. The device still works."""


class Download(Protocol):
    """Copies to the host, in progress. They are not ordered with later launches."""

    def wait(self) -> Sequence[Tensor]:
        """Wait for the copies, and for everything launched before them."""
        ...


class Device(Protocol):
    """One accelerator. Launches are carried out in order, except downloads."""

    compiles: bool
    """Whether the first launch of a kernel compiles it."""

    @property
    def torch_device(self) -> torch.device: ...

    def active(self) -> AbstractContextManager[object]:
        """Inside, work is launched on this device, in order. Afterwards the caller's own device and
        stream are current again."""
        ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host without waiting; `source` may be changed at once."""
        ...

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Copy to the host, in parallel with later launches. So these tensors must not be written later:
        they must be new tensors and not outputs of a graph, since all graphs share memory.
        """
        ...

    def mark(self) -> object:
        """Everything launched so far, for `beside`."""
        ...

    def beside(self, after: object, work: Callable[[], None]) -> None:
        """Carry out what `work` launches, after what the mark stands for and in parallel with later
        launches. Returns when it is done. From any thread, and from
        several at a time."""
        ...

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Capture `work` as a CUDA graph; returns a function that replays it. The addresses of its inputs
        and outputs are fixed. Its result is valid until the next replay of any graph, because all share
        memory. Call `work` itself before, so that nothing is compiled or loaded while capturing. Raises
        `CannotRecordError`.
        """
        ...

    def memory(self) -> DeviceMemory: ...

    def measure(self, work: Callable[[], None]) -> tuple[int, int] | None:
        """Bytes in use now, and the most additional bytes that `work` takes; None if they cannot be
        measured."""
        ...

    def keep_free(self, num_bytes: int) -> None:
        """Leave this much memory free when capturing, for steps without a graph."""
        ...

    def release(self) -> None:
        """Return memory to the system, after graphs and tensors have been dropped. Later graphs share no
        memory with earlier ones."""
        ...


class CudaDevice:
    """One GPU that PyTorch calls cuda, with its own streams: for steps, for downloads, for KV that is loaded,
    and for capturing.

    PyTorch's default capture stream is shared with other engines in the process: cuBLAS keeps one
    workspace per stream, and the graphs of both would contain its address.
    """

    compiles = True

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self._steps = torch.cuda.Stream(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._loads = torch.cuda.Stream(self.torch_device)
        self._keep_free = 0
        # Waiting takes a core unless the event blocks, which reports the end some 50 us later.
        blocking = len(os.sched_getaffinity(0)) <= FEW_CORES
        self._uploads, self._downloads = (Pieces(blocking=blocking) for _ in range(2))
        self._start_recordings()

    def _start_recordings(self) -> None:
        """A memory pool must not be used again once all its graphs have been dropped; cuBLAS's workspace
        for the capture stream is in it."""
        self._pool = torch.cuda.graph_pool_handle()
        self._capture = torch.cuda.Stream(self.torch_device)

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._steps)  # this also selects the device

    def upload(self, target: Tensor, source: Tensor) -> None:
        piece = self._uploads.take([source])
        [host] = piece.like([source])
        host.copy_(source)
        target.copy_(host, non_blocking=True)
        piece.done.record()
        self._uploads.give_back_when_done(piece)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        piece = self._downloads.take(tensors)
        hosts = piece.like(tensors)
        piece.launched.record()
        self._copies.wait_event(piece.launched)
        with torch.cuda.stream(self._copies):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(
                    self._copies
                )  # so that its memory is not reused before it is copied
            piece.done.record()
        return _CudaDownload(hosts, piece, self._downloads)

    def mark(self) -> object:
        return torch.cuda.current_stream(self.torch_device).record_event()

    def beside(self, after: object, work: Callable[[], None]) -> None:
        assert isinstance(after, torch.cuda.Event)
        with torch.cuda.stream(self._loads):
            self._loads.wait_event(after)
            work()
            self._loads.synchronize()

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        torch.cuda.empty_cache()  # a capture does this anyway; memory that is free now is free for steps
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        if free < self._keep_free:
            raise CannotRecordError(f"{free >> 20} MiB are free")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.torch_device)
        try:
            # thread_local: calls of the caller's other threads are not errors.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._capture, capture_error_mode="thread_local"
            ):
                result = work()
        except RuntimeError as error:  # lack of memory raises different errors
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize(self.torch_device)  # raises if the device is lost
            raise CannotRecordError(str(error).partition("\n")[0]) from None
        finally:
            torch.cuda.set_stream(
                stream
            )  # if the end of the capture failed, the other stream is still current

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        # Memory of the context and of libraries is not in PyTorch's statistics and cannot be freed.
        return DeviceMemory(total, free + torch.cuda.memory_reserved(self.torch_device))

    def measure(self, work: Callable[[], None]) -> tuple[int, int]:
        torch.cuda.synchronize(self.torch_device)
        held = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        work()
        torch.cuda.synchronize(self.torch_device)
        most = torch.cuda.max_memory_allocated(self.torch_device)
        torch.cuda.empty_cache()
        return held, most - held

    def keep_free(self, num_bytes: int) -> None:
        self._keep_free = num_bytes

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.torch_device)
        torch._C._cuda_clearCublasWorkspaces()
        self._start_recordings()
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _CudaDownload:
    hosts: Sequence[Tensor]
    piece: Piece | None
    """None once it was waited for."""
    pieces: Pieces

    def wait(self) -> Sequence[Tensor]:
        """The tensors are the caller's: they are copied from memory that is used again."""
        if (piece := self.piece) is not None:
            piece.done.synchronize()
            if piece.is_kept:
                self.hosts = [host.clone() for host in self.hosts]
            self.piece = None
            self.pieces.give_back(piece)
        return self.hosts


class HostDevice:
    """The CPU, synchronously."""

    compiles = False
    torch_device = torch.device("cpu")

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        return _Copied([tensor.clone() for tensor in tensors])

    def mark(self) -> object:
        return None

    def beside(self, after: object, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        return work

    def memory(self) -> DeviceMemory:
        return host_memory()

    def measure(self, work: Callable[[], None]) -> tuple[int, int] | None:
        return None

    def keep_free(self, num_bytes: int) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Copied:
    tensors: Sequence[Tensor]

    def wait(self) -> Sequence[Tensor]:
        return self.tensors

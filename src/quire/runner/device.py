"""What a runner asks of an accelerator: copies that run beside the host, and recorded work.

`CudaDevice` is the real one. `HostDevice` does the same at once, on the CPU: the runner's control flow is
tested with it, kernels interpreted, on machines without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quire.runner.footprint import DeviceMemory, host_memory

Result = TypeVar("Result")


class CannotRecordError(Exception):
    """There is no memory for one more recording, or the device refuses it; it goes on without."""


class Download(Protocol):
    """Copies on their way to the host, in no order with what is launched after them."""

    def wait(self) -> Sequence[Tensor]:
        """The copies, once they and all that was launched before them are done."""
        ...


class Device(Protocol):
    """One accelerator. What is launched on it is carried out in order, but for downloads."""

    @property
    def torch_device(self) -> torch.device: ...

    def active(self) -> AbstractContextManager[object]:
        """Inside, work goes to this device, in order with all that was launched inside before. Whatever the
        caller's own device and stream are, they are back afterwards."""
        ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host; `source` may change at once. The host does not wait."""
        ...

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Copy to the host, while what is launched next runs. So nothing launched later may write to
        these tensors: they are new ones, never a recording's, whose memory any recording may use.
        """
        ...

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """`work` as one launch. What it reads and writes stays where it is, and so does its result, which
        is good until the next call of any recording: they share their memory. Call `work` itself
        before, so that nothing is compiled or loaded while recording. Raises `CannotRecordError`.
        """
        ...

    def memory(self) -> DeviceMemory: ...

    def measure(self, work: Callable[[], None]) -> tuple[int, int] | None:
        """Bytes held now, and the most that `work` takes beside them; None where it cannot be told."""
        ...

    def keep_free(self, num_bytes: int) -> None:
        """Leave so much when recording, for steps that are not recorded."""
        ...

    def release(self) -> None:
        """Return memory to the system, once recordings and tensors are dropped. What is recorded next
        shares nothing with what was recorded before."""
        ...


class CudaDevice:
    """One GPU that PyTorch calls cuda, with streams of its own: for steps, for downloads and for recording.

    PyTorch's default capture stream would be shared with other engines in the process: cuBLAS keeps one
    workspace a stream, whose address their graphs would hold too.
    """

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self._steps = torch.cuda.Stream(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._keep_free = 0
        self._start_recordings()

    def _start_recordings(self) -> None:
        """A memory pool may not be used again once all its graphs are gone; cuBLAS's workspace for the
        capture stream is in it."""
        self._pool = torch.cuda.graph_pool_handle()
        self._capture = torch.cuda.Stream(self.torch_device)

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._steps)  # and its device

    # Page-locked memory comes from PyTorch's allocator, which gives a piece away again only when the copy
    # that uses it has run.

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source.pin_memory(), non_blocking=True)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
        done = torch.cuda.Event()
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._copies):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copies)  # not given to others before it is copied
            done.record()
        return _CudaDownload(hosts, done)

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        torch.cuda.empty_cache()  # a capture begins with it anyway: what is free now is free for steps
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        if free < self._keep_free:
            raise CannotRecordError(f"{free >> 20} MiB are free")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.torch_device)
        try:
            # thread_local: what other threads of the caller's do meanwhile is no error.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._capture, capture_error_mode="thread_local"
            ):
                result = work()
        except RuntimeError as error:  # memory that is missing shows in several ways
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize(self.torch_device)  # raises if the device is lost
            raise CannotRecordError(str(error).partition("\n")[0]) from None
        finally:
            torch.cuda.set_stream(
                stream
            )  # where the end of the capture failed, it is still the other

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        # What the context and libraries hold is neither ours to give nor in PyTorch's books.
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


@dataclass(frozen=True, slots=True)
class _CudaDownload:
    hosts: Sequence[Tensor]
    done: torch.cuda.Event

    def wait(self) -> Sequence[Tensor]:
        self.done.synchronize()
        return self.hosts


class HostDevice:
    """The CPU, at once."""

    torch_device = torch.device("cpu")

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        return _Copied([tensor.clone() for tensor in tensors])

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

"""What a runner asks of an accelerator: copies that run beside the host, events, recorded work.

`CudaDevice` is the real one. `HostDevice` does the same at once, on the CPU: the runner's control flow is
tested with it, kernels interpreted, on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Event(Protocol):
    def wait(self) -> None:
        """Until what was launched before the event is done."""
        ...


class Device(Protocol):
    """One accelerator. What is launched on it is carried out in order."""

    @property
    def torch_device(self) -> torch.device: ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host; `source` may change at once. The host does not wait."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, good once an event taken afterwards has happened."""
        ...

    def event(self) -> Event:
        """Happens when all that was launched so far is done."""
        ...

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """`work` as one launch. What it reads and writes stays where it is; so does its result, which
        the next call overwrites. Call `work` itself before, so that everything is compiled.
        """
        ...


class CudaDevice:
    """One GPU that PyTorch calls cuda, and its current stream."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()

    # Page-locked memory comes from PyTorch's allocator, which gives a piece away again only when the copy
    # that uses it has run.

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source.pin_memory(), non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def event(self) -> Event:
        event = torch.cuda.Event()
        event.record()
        return _CudaEvent(event)

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()

        def replay() -> Result:
            graph.replay()
            return result

        return replay


class _CudaEvent:
    __slots__ = ("_event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class HostDevice:
    """The CPU, at once."""

    torch_device = torch.device("cpu")

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def event(self) -> Event:
        return _Past()

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        return work


class _Past:
    def wait(self) -> None:
        pass

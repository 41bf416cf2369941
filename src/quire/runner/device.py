"""What a runner asks of an accelerator: copies that run beside the host, and recorded work.

`CudaDevice` is the real one. `HostDevice` does the same at once, on the CPU: the runner's control flow is
tested with it, kernels interpreted, on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Download(Protocol):
    """Copies on their way to the host, in no order with what is launched after them."""

    def wait(self) -> Sequence[Tensor]:
        """The copies, once they and all that was launched before them are done."""
        ...


class Device(Protocol):
    """One accelerator. What is launched on it is carried out in order, but for downloads."""

    @property
    def torch_device(self) -> torch.device: ...

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
        before, so that nothing is compiled or loaded while recording. Raises `torch.OutOfMemoryError`.
        """
        ...


class CudaDevice:
    """One GPU that PyTorch calls cuda: its current stream, and another one for downloads."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()

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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()

        def replay() -> Result:
            graph.replay()
            return result

        return replay


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

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        return _Copied([tensor.clone() for tensor in tensors])

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        return work


@dataclass(frozen=True, slots=True)
class _Copied:
    tensors: Sequence[Tensor]

    def wait(self) -> Sequence[Tensor]:
        return self.tensors

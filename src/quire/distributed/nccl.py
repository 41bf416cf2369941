"""Ranks with a GPU each: NCCL, of which only the all-gather is used. Never run on a device: tests use a fake.

A gather is launched on the current CUDA stream and does not wait for it, so it can be part of a CUDA graph.
NCCL gathers pieces of equal size: uneven ones are padded to the widest. How a width is divided is exchanged
in each gather outside of a capture, which waits for the device, and is remembered; a capture, where nothing
can be read back, uses what the run before it has learned.

A late rank is not noticed here, because nothing waits: the engine core notices it, which waits for a result.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from quire.distributed.gloo import open_store
from quire.errors import ConfigError, WorkerError


class _Work(Protocol):
    def wait(self) -> object: ...


class AllGather(Protocol):
    """The part of `torch.distributed.ProcessGroupNCCL` that is used."""

    def _allgather_base(self, output: Tensor, piece: Tensor) -> _Work:
        """output: [size * N], piece: [N], both dense and on the device."""
        ...

    def abort(self) -> object: ...


Columns = tuple[int, int]
"""First column, number of columns."""


class NcclGroup:
    """A `Group` of CUDA devices. Nothing is authenticated: the network must be private."""

    def __init__(
        self,
        address: str = "",
        *,
        rank: int,
        size: int,
        timeout: float = 60.0,
        descriptor: int = -1,
        process_group: AllGather | None = None,
        is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        """address, descriptor: as in `GlooGroup`. timeout: seconds to meet. process_group, is_capturing: for
        tests. Raises `ConfigError`, `WorkerError`."""
        self.rank, self.size = rank, size
        self._is_capturing = is_capturing
        self._divisions: dict[tuple[Columns, int], set[tuple[Columns, ...]]] = {}
        self._group = process_group or _connect(address, rank, size, timeout, descriptor)
        self._failure = ""

    def gather(self, x: Tensor, first: int, width: int) -> Tensor:
        if self._failure:
            raise WorkerError(self._failure)
        rows, count = x.shape
        division = self._division((first, count), width, x.device)
        widest = max(columns for _, columns in division)
        if count < widest:
            x = torch.nn.functional.pad(x, (0, widest - count))
        pieces = x.new_empty(self.size * rows * widest)
        self._group._allgather_base(pieces, x.contiguous().view(-1)).wait()
        parts = pieces.view(self.size, rows, widest)
        return torch.cat(
            [part[:, :columns] for part, (_, columns) in zip(parts, division, strict=True)], 1
        )

    def _division(self, mine: Columns, width: int, device: torch.device) -> tuple[Columns, ...]:
        """The columns of every rank."""
        known = self._divisions.setdefault((mine, width), set())
        if self._is_capturing():
            if len(known) != 1:
                raise ConfigError(
                    f"A gather of {width} columns, {mine[1]} from {mine[0]} at rank {self.rank}, is "
                    f"divided in {len(known)} ways; a CUDA graph needs one. Use --enforce-eager, or a "
                    "tensor_parallel_size that divides the heads evenly."
                )
            return next(iter(known))
        sent = torch.tensor(mine, device=device)
        received = sent.new_empty(2 * self.size)
        self._group._allgather_base(received, sent).wait()
        numbers = received.tolist()
        division = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        place = 0
        for begin, count in division:
            if begin != place:
                break
            place += count
        if place != width:
            raise WorkerError(
                f"The ranks' columns, {list(division)}, are not one whole of {width}. All ranks must "
                "serve the same model."
            )
        known.add(division)
        return division

    def barrier(self) -> None:
        """Of the hosts."""
        self._division((self.rank, 1), self.size, torch.device("cuda"))

    def abort(self, message: str) -> None:
        """End this rank's collectives: for a watcher, from any thread."""
        self._failure = self._failure or message
        self._group.abort()

    def close(self) -> None:
        self.abort("This rank's group is closed.")


def _connect(address: str, rank: int, size: int, timeout: float, descriptor: int) -> AllGather:
    try:
        from torch.distributed import ProcessGroupNCCL
    except ImportError as error:
        raise ConfigError("This PyTorch has no NCCL; install one built for CUDA.") from error
    wait = timedelta(seconds=timeout)
    options = ProcessGroupNCCL.Options()
    options._timeout = wait
    try:
        return ProcessGroupNCCL(open_store(address, wait, descriptor), rank, size, options)
    except RuntimeError as error:
        raise WorkerError(
            f"Rank {rank} did not meet the other ranks at {address}: {error}"
        ) from error

"""Ranks of a group as threads of one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from quire.distributed.shared_memory import SharedMemoryGroup, create_memory
from quire.errors import WorkerError
from quire.kernels.group import Group

T = TypeVar("T")
SECONDS = 60.0
DATA_BYTES = 16 << 20


@dataclass
class Meeting:
    """What the ranks share."""

    size: int
    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    num_gathers: int = 0

    def __post_init__(self) -> None:
        self.pieces = [(0, torch.empty(0))] * self.size
        self.barrier = threading.Barrier(self.size)


@dataclass
class ThreadGroup:
    """`Group`. Checks that all ranks make the same calls, and that their columns join to the whole."""

    rank: int
    meeting: Meeting

    @property
    def size(self) -> int:
        return self.meeting.size

    def gather(self, x: torch.Tensor, first: int, width: int) -> torch.Tensor:
        meeting = self.meeting
        meeting.pieces[self.rank] = (first, x.clone())
        self.barrier()
        firsts, pieces = zip(*meeting.pieces, strict=True)
        whole = torch.cat(pieces, dim=1)
        ends = [first + piece.shape[1] for first, piece in meeting.pieces]
        assert firsts == (0, *ends[:-1]) and ends[-1] == width == whole.shape[1], (firsts, ends)
        if self.rank == 0:
            meeting.num_gathers += 1
        self.barrier()
        return whole

    def barrier(self) -> None:
        self.meeting.barrier.wait(SECONDS)

    def abort(self, message: str) -> None:
        self.meeting.barrier.abort()

    def close(self) -> None:
        pass


def on_each_rank(
    size: int, work: Callable[[Group], T], *, share_memory: bool = True
) -> Sequence[T]:
    """What `work` returns on each rank, all at the same time. Raises what the first one raises.
    share_memory: False: a program calls `ThreadGroup.gather`."""
    meeting = Meeting(size)
    memory = create_memory(DATA_BYTES) if share_memory else -1
    groups: list[ThreadGroup | SharedMemoryGroup] = [
        SharedMemoryGroup(memory, rank=rank, size=size, timeout=SECONDS)
        if share_memory
        else ThreadGroup(rank, meeting)
        for rank in range(size)
    ]

    def run(group: ThreadGroup | SharedMemoryGroup) -> T:
        try:
            return work(group)
        except BaseException as error:
            group.abort(str(error))
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(run, group) for group in groups]
    for group in groups:
        group.close()
    if share_memory:
        os.close(memory)
    errors = [error for each in running if (error := each.exception()) is not None]
    late = (threading.BrokenBarrierError, WorkerError)
    for error in sorted(errors, key=lambda error: isinstance(error, late)):
        raise error
    return [each.result() for each in running]

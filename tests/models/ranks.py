"""Ranks of a group as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
SECONDS = 60.0


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

    def close(self) -> None:
        pass


def on_each_rank(size: int, work: Callable[[ThreadGroup], T]) -> Sequence[T]:
    """What `work` returns on each rank, all at the same time. Raises what the first one raises."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, meeting))
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for each in running if (error := each.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [each.result() for each in running]

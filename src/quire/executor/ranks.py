"""What the executor knows of a rank, however it was started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quire.distributed.links import Link


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a stage meet."""

    descriptor: int
    """Of the memory that they share; at the first rank of several machines, of a listening socket."""
    address: str = ""
    """HOST:PORT of that socket, if they are on several machines."""


class Rank(Protocol):
    """A worker that carries out plans in another process. Its process ends when the other end of its link is
    closed."""

    @property
    def number(self) -> int:
        """Of all ranks of the replica: stage * tensor_parallel_size + rank in the stage."""
        ...

    @property
    def name(self) -> str:
        """For errors: "rank 1 (pid 123)"."""
        ...

    @property
    def link(self) -> Link: ...

    def reason(self) -> str:
        """Why its link has ended: "was killed by SIGKILL"."""
        ...

    def end(self) -> None:
        """End it, at once if it does not end by itself; a stopped one too. Idempotent."""
        ...


class Ranks(Protocol):
    """All ranks of a replica but the one that samples, which is this process."""

    @property
    def ranks(self) -> list[Rank]: ...

    @property
    def meeting(self) -> Meeting:
        """Where the ranks of this process's stage meet."""
        ...

    @property
    def elsewhere(self) -> bool:
        """Whether they may be on other machines, so that they do not divide the cores of this one."""
        ...

    def close(self) -> None:
        """End them all. Idempotent."""
        ...

"""What the executor knows of a rank, however it was started."""

from __future__ import annotations

from typing import Protocol

from quire.distributed.links import Link


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
    def group_memory(self) -> int:
        """The descriptor of the memory that all ranks share; -1 if they do not."""
        ...

    @property
    def host(self) -> str | None:
        """This machine's address, for ranks that may be on others. None: all are here and share the cores."""
        ...

    def close(self) -> None:
        """End them all. Idempotent."""
        ...

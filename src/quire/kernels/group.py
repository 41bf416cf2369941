"""The ranks that compute one layer together, each some columns of every result; and channels between stages.

Ranks exchange results and never add them: a matrix is divided by its outputs, so every sum is computed by one
rank, in the order in which one device would compute it. The result of n ranks has the bits of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, dtype


class Group(Protocol):
    """This rank's membership. All ranks make the same calls in the same order. A call raises `WorkerError`,
    which names the rank, if another rank has died or is late by more than the timeout."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def gather(self, x: Tensor, first: int, width: int) -> Tensor:
        """x: [T, n], this rank's columns [first, first + n) of a whole with `width`. The columns of the ranks
        follow one another in the order of the ranks, and n may differ. Returns the whole, [T, width], a new
        tensor."""
        ...

    def barrier(self) -> None: ...

    def abort(self, message: str) -> None:
        """End every wait of every rank with a `WorkerError` of this message. From any thread."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Channel(Protocol):
    """From a rank of one stage to the same rank of the next, in one direction. A call raises `WorkerError`,
    which names the other rank, if that has died or is late by more than the timeout."""

    def send(self, x: Tensor) -> None:
        """x: [T, H]. Waits only if the receiver is behind by as many steps as there are stages."""
        ...

    def receive(self, num_rows: int, width: int, dtype: dtype) -> Tensor:
        """What was sent next, valid until the next call."""
        ...

    def abort(self, message: str) -> None:
        """End every wait with a `WorkerError` of this message. From any thread."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Channels:
    """Of one rank."""

    inlet: Channel | None = None
    """From the stage before; None at the first."""
    outlet: Channel | None = None
    """To the stage after; None at the last."""

"""The ranks that compute one layer together: each has some columns of every matrix's result.

Ranks exchange results and never add them: a matrix is divided by its outputs, so every sum is computed by one
rank, in the order in which one device would compute it. The result of n ranks has the bits of one.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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

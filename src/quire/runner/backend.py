"""What one kind of device must do for the runner, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import KVCache
from quire.kernels.program import StepRows
from quire.messages import AdmittedRequest, TokenLogprobs
from quire.runner.seats import Seats
from quire.structured.masks import Mask


@dataclass(slots=True)  # not frozen, nor the next: that would cost microseconds a step
class StepInput:
    """A step of B rows, of whose last tokens R are sampled after: arrays, since an object a row would cost a
    small model more than its products."""

    rows: StepRows
    """Its last column is of how many tokens the hidden states are wanted: of those sampled after, and those
    read. Good until the next step is made."""
    sample_rows: NDArray[np.int64]
    """[R]: index of the row, ascending."""
    sample_seats: NDArray[np.int64]
    """[R]"""
    positions: NDArray[np.int64]
    """[R]: index in its request of the token to be sampled."""
    read_rows: Sequence[int]
    """Rows whose wanted hidden states are to come back."""
    masks: Callable[[], Mapping[int, Mask]]
    """Which tokens may be sampled, by index in the R, where not all may: to be called while the device is
    computing."""


@dataclass(slots=True)
class StepSamples:
    """And `LaunchedSamples` for a device that is done when it returns."""

    token_ids: NDArray[np.int64]
    """[R]; anything where not valid."""
    valid: NDArray[np.bool_]
    """[R]: False where the logits held NaN."""
    logprobs: Mapping[int, TokenLogprobs]
    """By index in the R, of the valid ones that asked."""
    hidden: Sequence[Tensor]
    """Of each of `read_rows`, [at least as many as wanted, hidden_size]: its last tokens' after the final
    norm."""

    @classmethod
    def none(cls, hidden: Sequence[Tensor] = ()) -> StepSamples:
        """Of a step that samples nothing."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_), {}, hidden)

    def wait(self) -> StepSamples:
        return self


class LaunchedSamples(Protocol):
    def wait(self) -> StepSamples: ...


class StepBackend(Protocol):
    """What it is told takes effect in the order of the calls: a seat may be released and given to another
    request while the last step of its request is computed."""

    def active(self) -> AbstractContextManager[object]:
        """Whoever computes with what a step left on the device does it inside."""
        ...

    def open_cache(self, kv_cache: KVCache, seats: Seats) -> None: ...

    def admit(self, seat: int, request: AdmittedRequest) -> None: ...

    def release(self, seat: int) -> None: ...

    def force(self, seat: int, token_ids: Sequence[int]) -> None:
        """These were added to the request's output behind a sampled token; its seat has them."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination), none of them named twice."""
        ...

    def launch(self, step: StepInput) -> LaunchedSamples:
        """Compute a step. A device of its own is not waited for."""
        ...

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        ...

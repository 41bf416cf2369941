"""The interface between the runner and a kind of device."""

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
from quire.runner.prompt_work import Score
from quire.runner.seats import Seats
from quire.structured.masks import Mask


@dataclass(slots=True)  # not frozen, nor the next: that would cost microseconds a step
class StepInput:
    """A step of B rows with R samples. It consists of arrays, because an object for each row would take
    longer than a small model's products."""

    rows: StepRows
    """Its last column is the number of tokens whose hidden states are wanted, for samples and for prompt
    work. Valid until the next step is made."""
    sample_rows: NDArray[np.int64]
    """[R]: index of the row, ascending."""
    sample_seats: NDArray[np.int64]
    """[R]"""
    positions: NDArray[np.int64]
    """[R]: index in its request of the token to be sampled."""
    drafts: NDArray[np.int64] | None
    """[R]: the draft after which a token is sampled, as if it were right, or `NO_DRAFT`. None if the step
    verifies no drafts."""
    read_rows: Sequence[int]
    """Rows whose wanted hidden states are returned."""
    masks: Callable[[], Mapping[int, Mask]]
    """The tokens that may be sampled, by index in the R, for samples that have a mask. Call it while the
    device computes."""


@dataclass(slots=True)
class StepSamples:
    """The samples of a step. Also a `LaunchedSamples`, for a device that has finished when `launch`
    returns."""

    token_ids: NDArray[np.int64]
    """[R]; undefined where not valid."""
    valid: NDArray[np.bool_]
    """[R]: False where the logits held NaN."""
    logprobs: Mapping[int, TokenLogprobs]
    """By index in the R, for valid samples with logprobs."""
    hidden: Sequence[Tensor]
    """For each of `read_rows`, the hidden states of its last tokens after the final norm: [at least as
    many as wanted, hidden_size]."""
    tapped: Tensor | None = None
    """`ForwardPass.tapped`, if the model has taps."""

    @classmethod
    def none(cls, hidden: Sequence[Tensor] = ()) -> StepSamples:
        """The result of a step without samples."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_), {}, hidden)

    def wait(self) -> StepSamples:
        return self


class LaunchedSamples(Protocol):
    def wait(self) -> StepSamples: ...


class StepBackend(Protocol):
    """All that a device must do. Calls take effect in their order: a seat may be released and given to
    another request while the last step of the old request is computed."""

    def active(self) -> AbstractContextManager[object]:
        """The context for computing with what a step left on the device."""
        ...

    def open_cache(self, kv_cache: KVCache, seats: Seats) -> None: ...

    def admit(self, seat: int, request: AdmittedRequest) -> None: ...

    def release(self, seat: int) -> None: ...

    def append(self, seat: int, token_ids: Sequence[int]) -> None:
        """Tokens follow the one that was sampled first in the last step: those of accepted drafts, and
        forced ones. `Seats` has them already."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination); no block occurs twice."""
        ...

    def launch(self, step: StepInput) -> LaunchedSamples:
        """Start a step. On a GPU this does not wait."""
        ...

    @property
    def score(self) -> Score:
        """The logprobs of prompts."""
        ...

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        ...

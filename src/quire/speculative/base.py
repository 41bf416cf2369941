"""The interface between the runner and a drafter.

Nothing that a drafter does can change a token: a draft is accepted only if it equals the token that is
sampled at its position with the request's own random stream. A drafter decides only how many steps a request
takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from quire.config import Speculation
from quire.kernels.program import StepRows
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.speculative.spec import DraftSpec, HeadDraftSpec


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter is made from."""

    options: Speculation
    target: DecoderModel
    draft: DraftSpec | HeadDraftSpec | None = None
    """For the methods with a model."""
    load_format: str = "auto"
    seed: int = 0
    """Of dummy weights."""


@dataclass(slots=True)
class DraftTask:
    """One request for which drafts are wanted."""

    seat: int
    num_tokens: int
    """Number of known tokens: `token_ids[seat, :num_tokens]`. The first draft is at this index."""
    most: int
    """The most drafts wanted, at least 1."""


class Drafter(Protocol):
    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        """Called before the first plan, and again if the cache is opened again; all that was kept of earlier
        requests and blocks is void. rows: the arrays of tokens and block tables by seat, which the runner
        keeps up to date."""
        ...

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        """A plan is about to be computed. Its admitted requests have their seats (by request id), and the
        arrays have its blocks; nothing of it is copied or computed yet."""
        ...

    def release(self, seat: int) -> None:
        """The request in this seat has ended or is preempted."""
        ...

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        """For each task the drafts, in order: at most `most`, and fewer or none where it has no good
        guess."""
        ...


@runtime_checkable
class StateReader(Protocol):
    """A drafter that reads the target's hidden states."""

    taps: tuple[int, ...]
    """For `DecoderModel.taps`."""

    def read(self, tapped: Tensor) -> None:
        """The tokens of the last plan have been computed, drafts among them. Called after `begin`, for every
        plan with rows, before `propose`. tapped: as `ForwardPass.tapped`."""
        ...

"""What a scheduler did: plain values, to explain, draw and compare. The record (`scheduler/record.py`) is
read into these; times are seconds of the scheduler's clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.messages import FinishReason
from quire.scheduler.decisions import Decision


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request reached the scheduler."""

    request_id: int
    time: float
    num_prompt_tokens: int
    max_tokens: int
    tenant: int = 0
    """A salted hash of the tenant's name; 0 for none."""
    sent: float = 0.0
    """When the front end took it, while a step may have been under way; 0.0 if that is not known."""

    @property
    def start(self) -> float:
        return min(self.sent or self.time, self.time)


@dataclass(frozen=True, slots=True)
class RowRecord:
    """A request's share of a step: tokens [start, start + num_tokens)."""

    request_id: int
    start: int
    num_tokens: int
    samples: int
    num_drafts: int = 0
    """Of its tokens, those that were drafts."""
    num_accepted: int = 0
    """Tokens that the request had more after the step; 0 while the step is in flight."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    step_id: int
    planned: float
    """When `schedule` was called."""
    done: float | None
    """When its result was applied; None while it is in flight."""
    budget: int
    num_free: int
    """Blocks, before the step was planned."""
    num_blocks: int
    num_running: int
    """After the step was planned."""
    num_waiting: int
    rows: tuple[RowRecord, ...]
    decisions: tuple[Decision, ...]
    """Of this step, and until the next one; a reason that a request had in the step before is not repeated
    (`DecisionLog`)."""
    stopped_at: int | None = None
    """The request at which admission stopped. Waiting requests after it were not considered."""


@dataclass(frozen=True, slots=True)
class End:
    request_id: int
    time: float
    reason: FinishReason
    num_output_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class History:
    """The last steps of one scheduler, oldest first. What happened before the oldest is lost."""

    steps: tuple[StepRecord, ...] = ()
    arrivals: Mapping[int, Arrival] = field(default_factory=dict)
    """By request id."""
    ends: Mapping[int, End] = field(default_factory=dict)
    epoch: float = 0.0
    """Unix time at the clock's zero."""

    def under_way(self, time: float) -> StepRecord | None:
        """The step that was computed then, or was the last to be launched."""
        at = bisect_right(self.steps, time, key=lambda step: step.planned)
        step = self.steps[at - 1] if at else None
        return step if step is not None and (step.done is None or step.done > time) else None

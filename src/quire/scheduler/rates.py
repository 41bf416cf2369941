"""When steps begin and end, and how often requests end."""

from __future__ import annotations

from collections.abc import Iterable

from quire.messages import StepPlan

MEMORY = 127 / 128
"""What a step leaves of the weight of those before it."""


class Rates:
    """Of the steps of one scheduler."""

    def __init__(self) -> None:
        self._since: float | None = None
        """When the step under way began: when the result of the one before it came, if there was one."""
        self._steps = self._ended = self._time = 0.0
        """The last steps, running requests that ended since then, and what the steps took."""

    @property
    def ends_per_step(self) -> float:
        """Running requests that end."""
        return self._ended / self._steps if self._steps else 0.0

    @property
    def ends_per_second(self) -> float:
        return self._ended / self._time if self._time else 0.0

    def ended(self) -> None:
        """A running request has ended."""
        self._ended += 1

    def begin(self, now: float) -> None:
        """A plan is being made."""
        if self._since is None:
            self._since = now

    def end(self, plan: StepPlan, now: float, *, is_idle: bool) -> float:
        """A plan is done; returns its seconds. is_idle: no request is left, so the time until the next plan
        is not a step's."""
        seconds = 0.0 if self._since is None else now - self._since
        self._since = None if is_idle else now
        if plan.rows:
            self._count(seconds)
        return seconds

    def repeat(self, results: Iterable[float]) -> list[float]:
        """Steps of the same requests, one after the other: when the result of each came. Returns their
        seconds."""
        taken = []
        for now in results:
            taken.append(0.0 if self._since is None else now - self._since)
            self._since = now
            self._count(taken[-1])
        return taken

    def _count(self, seconds: float) -> None:
        self._steps = MEMORY * self._steps + 1
        self._ended *= MEMORY
        self._time = MEMORY * self._time + seconds

"""What steps take, as measured: for decisions whose alternatives take time."""

from __future__ import annotations

from collections.abc import Iterable

from quire.messages import StepPlan

PROMPT_MEMORY = 7 / 8
"""What a step leaves of the weight of those before it: one that computes prompts, and one that does not."""
MEMORY = 127 / 128


class Rates:
    """Of the steps of one scheduler."""

    def __init__(self) -> None:
        self._since: float | None = None
        """When the step under way began: when the result of the one before it came, if there was one."""
        self._prompt_tokens = self._prompt_seconds = 0.0
        """Of the last few steps that computed prompts."""
        self._steps = self._ended = self._time = 0.0
        """The last steps, running requests that ended since then, and what the steps took."""
        self._rows = self._seconds = self._rows_squared = self._rows_seconds = self._weight = 0.0
        """Sums over the last steps without prompts: for a line through their times."""

    @property
    def prompt_token(self) -> float:
        """Seconds per token of steps that compute prompts. 0.0 if there was none yet."""
        return self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else 0.0

    @property
    def ends_per_step(self) -> float:
        """Running requests that end."""
        return self._ended / self._steps if self._steps else 0.0

    @property
    def ends_per_second(self) -> float:
        return self._ended / self._time if self._time else 0.0

    @property
    def num_steps(self) -> float:
        """The number of measured steps without prompts, of which the older ones count less."""
        return self._weight

    def row_gain(self, num_rows: int) -> float:
        """Seconds that a step with one row more saves, because its token is not computed in a later step: a
        row's share of the time that a step takes whatever its rows."""
        if not self._weight:
            return 0.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_squared / self._weight - rows * rows
        slope = 0.0
        if spread > 0.01 * rows * rows:
            slope = (self._rows_seconds / self._weight - rows * seconds) / spread
        slope = min(max(slope, 0.0), seconds / max(rows, 1.0))
        return max(0.0, seconds - slope * rows) / (num_rows + 1)  # rounding may make it negative

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
        rows, tokens = len(plan.rows), plan.num_tokens
        if not rows:
            return seconds
        if tokens > rows and any(row.num_tokens > max(1, row.samples) for row in plan.rows):
            self._prompt_tokens = PROMPT_MEMORY * self._prompt_tokens + tokens
            self._prompt_seconds = PROMPT_MEMORY * self._prompt_seconds + seconds
            self._count(seconds)
        else:
            self._count_rows(rows, seconds)
        return seconds

    def repeat(self, rows: int, results: Iterable[float]) -> None:
        """Steps of so many rows without prompts, one after the other: when the result of each came."""
        for now in results:
            seconds = 0.0 if self._since is None else now - self._since
            self._since = now
            self._count_rows(rows, seconds)

    def _count(self, seconds: float) -> None:
        self._steps = MEMORY * self._steps + 1
        self._ended *= MEMORY
        self._time = MEMORY * self._time + seconds

    def _count_rows(self, rows: int, seconds: float) -> None:
        self._count(seconds)
        self._weight = MEMORY * self._weight + 1
        self._rows = MEMORY * self._rows + rows
        self._seconds = MEMORY * self._seconds + seconds
        self._rows_squared = MEMORY * self._rows_squared + rows * rows
        self._rows_seconds = MEMORY * self._rows_seconds + rows * seconds

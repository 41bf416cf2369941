"""The seconds of a step, predicted from what it computes, and fitted to the measured ones while serving.

All that is decided by times asks this one object: the target for a step's time, the predicted wait, the
number of drafts, admission, preemption and loads. Predictions without a device (`quire simulate`, `quire
plan`) have the same inputs, and an engine may start from the file of a device (`scheduler/fitted.py`).

    seconds = rows * c0 + contexts * c1 + constant * c2 + prompt_tokens * c3 + prompt_contexts * c4

It is a least-squares fit of relative errors in which older steps count less. Three things differ from the
usual recursive form:

* Coefficients are never negative, so that more work never seems to take less time. The normal equations are
  kept (not their inverse), and each step improves the coefficients by one pass of projected Gauss-Seidel. No
  exact solution is needed: what has been seen is predicted well after a few passes, also where coefficients
  cannot be told apart, as those of a batch that stays the same.
* Steps with prompts and steps without make each other not older. Else what is known of prompts would be lost
  while there are none.
* A step far from its prediction counts as if it were `OUTLIER` times off. After `CHANGE` such steps in a row,
  on the same side, they are no outliers: they count as measured, and what was before is forgotten faster.

A line has no knee. Where that counts, for the number of drafts, the time of a step by the number of tokens
that it samples is measured beside it (`scheduler/step_cost.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

from quire.messages import PlannedRow, StepPlan
from quire.scheduler.step_cost import StepCost

KEEP = 1 - 1 / 64
"""What a step leaves of the weight of those before it of its kind."""
KEEP_AT_CHANGE = 0.25
OUTLIER = 1.4
CHANGE = 3
FIRST = 4
"""Of each kind, steps that count as measured."""
FIRST_SPREAD, SPREAD_RATE = 0.08, 1 / 32
FIRST_STEPS, MEASURED = 256, 4
"""After so many steps without prompts, one in so many is measured."""
START_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
START_CONTEXTS, START_PARTS = (64, 512, 2048), (0.0, 1 / 32, 1 / 4, 1.0)
"""Steps from which a start with a known device learns. Parts: of the rest of the budget, for prompts."""
PASSES = 200


class Work(NamedTuple):
    """What a step computes. In the order of the coefficients."""

    rows: float = 0.0
    """Tokens of requests that generate, drafts included."""
    contexts: float = 0.0
    """Tokens to which those attend."""
    constant: float = 1.0
    prompt_tokens: float = 0.0
    prompt_contexts: float = 0.0
    """Tokens to which those attend, in sum."""


SIZE = len(Work._fields)
FEW = 3
"""The first coefficients, which steps without prompts have."""
_ORDER = (3, 0, 4, 1, 2)
"""Of a pass: what cannot be told apart yet is attributed to tokens first."""


def work_of(rows: Iterable[PlannedRow]) -> Work:
    """A chunk of one token counts as a row: it costs as much."""
    single = contexts = tokens = prompts = 0
    for row in rows:
        count, start = row.num_tokens, row.start
        if count == 1:
            single += 1
            contexts += start
        elif row.draft_token_ids:
            single += count
            contexts += count * start
        else:
            tokens += count
            prompts += count * start + count * count // 2
    return Work(single, contexts, 1.0, tokens, prompts)


class CostModel:
    is_bound: ClassVar[bool] = False

    def __init__(self) -> None:
        self.coefficients = [0.0] * SIZE
        self.sampling = StepCost()
        """By the number of sampled tokens; measured if there is a drafter (`scheduler/drafting.py`)."""
        self.predicted = 0.0
        """Of the last step that was measured, what was expected of it."""
        self.mean_context = 0.0
        """Of the last prompts, to how many tokens one attended."""
        self._few = [[0.0] * FEW for _ in range(FEW)]
        self._few_right = [0.0] * FEW
        """The normal equations of steps without prompts."""
        self._all = [[0.0] * SIZE for _ in range(SIZE)]
        self._all_right = [0.0] * SIZE
        """Of steps with prompts."""
        self._sum = [[0.0] * SIZE for _ in range(SIZE)]
        self._right = [0.0] * SIZE
        self._seen = [0, 0]
        """Measured steps without prompts, and with."""
        self._num_steps = 0
        """Without prompts."""
        self._streak = [0, 0]
        """Outliers in a row; negative if they were faster."""
        self._spread = [FIRST_SPREAD, FIRST_SPREAD]

    def seconds(self, work: Work) -> float:
        """0.0 if nothing is known."""
        a, b, c, d, e = self.coefficients
        return work[0] * a + work[1] * b + c + work[3] * d + work[4] * e

    @property
    def spread(self) -> float:
        """The mean relative error of predictions, of steps with prompts: about 0.8 standard deviations."""
        return self._spread[1]

    @property
    def knows_prompts(self) -> bool:
        return self._seen[1] > 0

    @property
    def num_steps(self) -> int:
        """The number of measured steps without prompts."""
        return self._seen[0]

    def prompt_seconds(self, num_tokens: int, start: float = 0.0) -> float:
        """What so many tokens of a prompt take after `start` others, in a step that is made anyway. 0.0 if
        nothing is known."""
        token, context = self.coefficients[3:]
        return num_tokens * (token + context * (start + num_tokens / 2))

    def row_gain(self, num_rows: int) -> float:
        """Seconds that a step with one row more saves, because its token is not computed in a later step: a
        row's share of the time that a step takes whatever its rows. That is the constant of a line through
        the last steps without prompts; if all had as many rows, all their time."""
        weight = self._few[2][2]
        if not weight:
            return 0.0
        rows, seconds = self._few[2][0] / weight, self._few_right[2] / weight
        spread = self._few[0][0] / weight - rows * rows
        slope = 0.0
        if spread > 0.01 * rows * rows:
            slope = (self._few_right[0] / weight - rows * seconds) / spread
        slope = min(max(slope, 0.0), seconds / max(rows, 1.0))
        return max(0.0, seconds - slope * rows) / (num_rows + 1)  # rounding may make it negative

    # --- measuring --------------------------------------------------------------------------------

    def measure(self, plan: StepPlan, seconds: float) -> None:
        """A step is over."""
        rows = plan.rows
        if not rows:
            return
        if plan.num_tokens == len(rows):
            if self._is_measured():
                self._measure(work_of(rows), seconds)
            return
        work = work_of(rows)
        self._measure(work, seconds)
        if work.prompt_tokens:
            self.mean_context += (work.prompt_contexts / work.prompt_tokens - self.mean_context) / 8

    def repeat(self, rows: int, contexts: int, seconds: Iterable[float]) -> None:
        """Steps of so many rows without prompts, one after the other, as if each had been passed to
        `measure`. contexts: of the first."""
        for each in seconds:
            if self._is_measured():
                self._measure(Work(rows, contexts), each)
            contexts += rows

    def start(self, known: Callable[[Work], float], *, rows: int, tokens: int) -> None:
        """Begin as if steps had been measured that take what is known. rows, tokens: the most of a step."""
        for context in START_CONTEXTS:
            for part in START_PARTS:
                for size in START_ROWS:
                    count = int(part * (tokens - size))
                    if size <= rows and count != 1:
                        attended = count * context + count * count / 2
                        self._assume(Work(size, size * context, 1.0, count, attended), known)
        for _ in range(PASSES):
            self._improve()
        self.sampling.start(
            {size: known(Work(size, size * START_CONTEXTS[1])) for size in START_ROWS}
        )

    def _assume(self, work: Work, known: Callable[[Work], float]) -> None:
        seconds = known(work)
        if seconds > 0.0:
            self._seen[work.prompt_tokens > 0] += 1
            self._add(work, seconds, KEEP, 1.0 / (seconds * seconds), work.prompt_tokens > 0)

    def _is_measured(self) -> bool:
        """Whether the next step without prompts is."""
        self._num_steps += 1
        return self._num_steps <= FIRST_STEPS or self._num_steps % MEASURED == 0

    def _measure(self, work: Work, seconds: float) -> None:
        self.predicted = self.seconds(work)
        self.observe(work, seconds)

    def observe(self, work: Work, seconds: float) -> None:
        """A step has been measured."""
        if seconds <= 0.0:
            return
        expected = self.seconds(work)
        prompts = 1 if work[3] else 0
        keep = KEEP
        if expected and self._seen[prompts] >= FIRST:
            error = seconds / expected
            off = min(max(error, 1 / OUTLIER), OUTLIER)
            self._spread[prompts] += SPREAD_RATE * (abs(off - 1) - self._spread[prompts])
            if off == error:
                self._streak[prompts] = 0
            else:
                side = 1 if error > 1 else -1
                self._streak[prompts] = side + max(0, self._streak[prompts] * side) * side
                if abs(self._streak[prompts]) >= CHANGE:
                    keep = KEEP_AT_CHANGE
                else:
                    seconds = expected * off
            scale = expected
        else:
            scale = seconds
        self._seen[prompts] += 1
        self._add(work, seconds, keep, 1.0 / (scale * scale), bool(prompts))
        self._improve()

    def _add(self, work: Work, seconds: float, keep: float, weight: float, prompts: bool) -> None:
        a, b, c, d, e = work
        total, right = self._sum, self._right
        if prompts:
            few, few_right = self._few, self._few_right
            for i, row in enumerate(self._all):
                x = weight * work[i]
                row[0] = keep * row[0] + x * a
                row[1] = keep * row[1] + x * b
                row[2] = keep * row[2] + x * c
                row[3] = keep * row[3] + x * d
                row[4] = keep * row[4] + x * e
                self._all_right[i] = right[i] = keep * self._all_right[i] + x * seconds
                total[i][:] = row
            for i, line in enumerate(few):
                self._plus(total[i], line)
                right[i] += few_right[i]
            return
        for i, row in enumerate(self._few):
            x = weight * work[i]
            row[0] = keep * row[0] + x * a
            row[1] = keep * row[1] + x * b
            row[2] = keep * row[2] + x * c
            self._few_right[i] = keep * self._few_right[i] + x * seconds
            line, into = self._all[i], total[i]
            into[0] = line[0] + row[0]
            into[1] = line[1] + row[1]
            into[2] = line[2] + row[2]
            right[i] = self._all_right[i] + self._few_right[i]

    @staticmethod
    def _plus(into: list[float], line: Sequence[float]) -> None:
        into[0] += line[0]
        into[1] += line[1]
        into[2] += line[2]

    def _improve(self) -> None:
        """One pass: each coefficient is set to its best value, given the others."""
        a, b, c, d, e = known = self.coefficients
        for i in _ORDER:
            row = self._sum[i]
            if row[i]:
                rest = row[0] * a + row[1] * b + row[2] * c + row[3] * d + row[4] * e
                better = known[i] + (self._right[i] - rest) / row[i]
                known[i] = better if better > 0.0 else 0.0
                a, b, c, d, e = known

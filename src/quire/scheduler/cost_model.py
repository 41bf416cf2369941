"""The seconds of a step, predicted from what it computes: five coefficients, fitted while serving.

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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from quire.messages import PlannedRow

KEEP = 1 - 1 / 64
"""What a step leaves of the weight of those before it of its kind."""
KEEP_AT_CHANGE = 0.25
OUTLIER = 1.4
CHANGE = 3
FIRST = 4
"""Of each kind, steps that count as measured."""
FIRST_SPREAD, SPREAD_RATE = 0.08, 1 / 32


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
    def __init__(self) -> None:
        self.coefficients = [0.0] * SIZE
        self._few = [[0.0] * FEW for _ in range(FEW)]
        self._few_right = [0.0] * FEW
        """The normal equations of steps without prompts."""
        self._all = [[0.0] * SIZE for _ in range(SIZE)]
        self._all_right = [0.0] * SIZE
        """Of steps with prompts."""
        self._sum = [[0.0] * SIZE for _ in range(SIZE)]
        self._right = [0.0] * SIZE
        self._seen = [0, 0]
        """Steps without prompts, and with."""
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

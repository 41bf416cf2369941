"""TTFT and ITL of one replica at a rate of requests: formulas of queueing over the time of a step.

Requests arrive at random (Poisson), each with `prompt` tokens in and `output` tokens out. With N of them
running, a step computes N rows of mean context prompt + output / 2, and N / output requests end, so as many
begin. A step has room for budget - N tokens of prompts. A piece is a prompt or what of it fits a step; the
number of pieces in a step is Poisson with mean N * prompt / (output * piece), and what does not fit is moved
to other steps:

    step(N)  = mean over the number of pieces of StepTime(N rows, pieces)
    rate(N)  = N / (output * step(N))            Little's law; it rises with N, and is inverted by bisection
    ITL      = step(N); its p99: the step with the 99th percentile of pieces
    TTFT     = request overhead + the rest of a step + the step in flight + seat wait + budget wait
               + the steps of its own pieces, which are shared with prompts that came meanwhile

* Most N: the least of max_num_seqs, the sequences of prompt + output that the blocks hold, and the N at which
  prompts fill the budget. The rate there is the saturation rate; nothing is stable beyond.
* Seat wait: N seats, each taken for output * step: Sakasegawa's approximation of M/M/c,
  S / c * rho ** (sqrt(2 (c + 1)) - 1) / (1 - rho), with rho = rate / saturation rate.
* Budget wait: prompts share what steps leave to them: M/D/1, s * rho / (2 (1 - rho)), with s the time of a
  prompt's pieces at full budget and rho the share of the budget that prompts use.
* The rest of a step is mean(step^2) / (2 mean(step)): one arrives more often in a long step.
* p99 of a wait of mean w that occurs with probability rho: w / rho * ln(100 rho), an exponential tail. p99 of
  the steps before the own ones: each of them as long as the p99 of ITL.

It knows nothing of preemption, shared prefixes, bursts and lengths that differ; `quire simulate` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from quire.plan.cost import StepTime
from quire.scheduler.cost_model import Work

TAIL = 0.01
"""p99."""


class Lengths(NamedTuple):
    prompt: int
    output: int

    @property
    def context(self) -> float:
        """The mean number of tokens that a row attends to while its request generates."""
        return self.prompt + self.output / 2

    @property
    def total(self) -> int:
        return self.prompt + self.output


class Point(NamedTuple):
    """At one rate. Times in seconds."""

    rate: float
    """Requests a second."""
    rows: float
    """Requests that generate, in the mean."""
    itl: float
    itl_p99: float
    ttft: float
    ttft_p99: float
    utilization: float
    """Of the saturation rate."""


@dataclass(frozen=True)
class Replica:
    """One replica under load."""

    time: StepTime
    lengths: Lengths
    seats: int
    """max_num_seqs, or what the blocks hold."""
    budget: int
    """max_num_batched_tokens."""
    overhead: float = 0.0
    """Seconds before a request's first step."""
    ahead: float = 0.0
    """Steps that are planned before the one before them has ended (`async_scheduling` on a GPU: 1)."""

    @cached_property
    def most_rows(self) -> float:
        prompt, output = self.lengths
        return min(self.seats, self.budget / (1 + prompt / output))

    @cached_property
    def full_step(self) -> float:
        """With the most rows."""
        return self.mean_step(self.most_rows)

    @property
    def saturation(self) -> float:
        """Requests a second."""
        return self.most_rows / (self.lengths.output * self.full_step)

    def room(self, rows: float) -> float:
        return max(1.0, self.budget - rows)

    def step(self, rows: float, prompt_tokens: float = 0.0) -> float:
        """Of rows in mid-answer, and so many tokens of prompts, which on average have half of theirs before
        them."""
        context = self.lengths.context
        pairs = prompt_tokens * self.lengths.prompt / 2
        return self.time.seconds(Work(rows, rows * context, 1.0, prompt_tokens, pairs))

    def alone(self) -> list[Work]:
        """The steps of one prompt, if nothing else runs."""
        prompt, budget = self.lengths.prompt, self.budget
        starts = range(0, prompt, budget)
        sizes = [min(budget, prompt - start) for start in starts]
        return [
            Work(0.0, 0.0, 1.0, size, size * start + size * size / 2)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def pieces(self, rows: float) -> list[tuple[float, float]]:
        """Steps with 0, 1, ... pieces of prompts: their share and seconds. What does not fit a step is in
        others, so that the mean number of tokens is what the requests bring."""
        prompt, output = self.lengths
        room = self.room(rows)
        piece, wanted = min(prompt, room), rows * prompt / output
        mean, most = wanted / piece, math.ceil(room / piece)
        shares = [math.exp(-mean)]
        while len(shares) < most and sum(shares) < 1 - 1e-6:
            shares.append(shares[-1] * mean / len(shares))
        shares.append(max(0.0, 1.0 - sum(shares)))
        tokens = [min(room, piece * count) for count in range(len(shares))]
        missing = wanted - sum(share * each for share, each in zip(shares, tokens, strict=True))
        for count, each in enumerate(tokens[:-1]):
            if missing > 0:
                moved = min(shares[count], missing / (tokens[-1] - each))
                shares[count] -= moved
                shares[-1] += moved
                missing -= moved * (tokens[-1] - each)
        return [(share, self.step(rows, each)) for share, each in zip(shares, tokens, strict=True)]

    def mean_step(self, rows: float) -> float:
        return sum(share * seconds for share, seconds in self.pieces(max(rows, 1.0)))

    def rate(self, rows: float) -> float:
        return rows / (self.lengths.output * self.mean_step(rows))

    def rows_at(self, rate: float) -> float | None:
        """None: more than it can serve."""
        if rate >= self.saturation:
            return None
        low, high = 0.0, self.most_rows
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < rate else (low, middle)
        return high

    def at(self, rate: float) -> Point | None:
        """None: it is not stable."""
        rows = self.rows_at(rate)
        return None if rows is None else self.with_rows(rows)

    def with_rows(self, rows: float) -> Point:
        """rows: less than `most_rows`."""
        prompt, output = self.lengths
        together = max(rows, 1.0)
        steps = self.pieces(together)
        mean = sum(share * seconds for share, seconds in steps)
        rate = rows / (output * mean)
        room = self.room(together)
        count = math.ceil(prompt / room)
        piece = min(prompt, room)
        alone, busy = self.step(together, piece), min(1.0, rows)
        residual = sum(share * seconds * seconds for share, seconds in steps) / (2 * mean)
        reach = busy * (residual + self.ahead * mean)
        own, own_tail = (
            count * self.step(together, min(room, piece * (1 + rate * window)))
            for window in (reach, busy * alone)
        )
        seats_used = rate / self.saturation
        seats = _sakasegawa(self.most_rows, seats_used, output * self.full_step)
        used = rows * prompt / (output * room)
        one = self.step(together, room) * prompt / room
        shared = one * used / (2 * (1 - used)) if used < 1 else math.inf
        slow = _percentile(steps)
        tail = max(busy * (1 + self.ahead) * max(slow, mean), _tail(shared, used))
        tail += _tail(seats, seats_used)
        return Point(
            rate=rate,
            rows=rows,
            itl=mean,
            itl_p99=slow,
            ttft=self.overhead + own + reach + seats + shared,
            ttft_p99=self.overhead + own_tail + tail,
            utilization=seats_used,
        )

    def device_seconds(self, rows: float) -> tuple[float, float]:
        """Of one prompt token, and of one output token: a mean step's time, divided by what a step without
        prompts takes and what prompts add."""
        prompt, output = self.lengths
        rows = max(rows, 1.0)
        alone, mean = self.step(rows), self.mean_step(rows)
        return (mean - alone) * output / (rows * prompt), alone / rows


def _sakasegawa(seats: float, rho: float, service: float) -> float:
    if rho >= 1:
        return math.inf
    return service / seats * rho ** (math.sqrt(2 * (seats + 1)) - 1) / (1 - rho)


def _tail(wait: float, rho: float) -> float:
    return 0.0 if rho <= TAIL or not wait else wait / rho * math.log(rho / TAIL)


def _percentile(steps: list[tuple[float, float]]) -> float:
    """The time that all steps but 1 % have at most. steps: the slowest last."""
    left = TAIL
    for share, seconds in reversed(steps):
        left -= share
        if left < 0:
            return seconds
    return steps[0][1]

"""Traffic: when requests come, how long they are, and which prefixes they share.

A prompt is a list of runs, `(content, length)`: so many times the same token, which no other content has. Two
prompts share as many tokens as they have equal runs at the beginning, so a trace says what is shared without
any text. Everything is a function of the seed.

Sources of the tables: the quantiles of the Azure LLM inference traces of 2023 (CC-BY 4.0, Microsoft) and of
Mooncake's conversation trace (Apache 2.0) were computed from their files; those of `sharegpt` are of the
stand-in in `quire.bench.datasets.sharegpt`. The traces themselves are not part of Quire.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from quire.errors import ConfigError

Runs = tuple[tuple[int, int], ...]

SHARES = (0.0, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
"""Of the quantiles in a `Shape`."""
DAY = 86400.0
CHUNK = 512
"""Tokens of Mooncake's blocks."""
MOST_REQUESTS = 20_000_000
"""Of a generated trace, which is in memory as a whole."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    time: float
    """Seconds from the beginning."""
    prompt: Runs
    output_len: int

    @property
    def prompt_len(self) -> int:
        return sum(length for _, length in self.prompt)

    def tokens(self) -> list[int]:
        found: list[int] = []
        for content, length in self.prompt:
            found += [content] * length
        return found


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of traffic. Between quantiles, lengths follow a straight line in logarithms. The outermost
    values are such that the means are those of the trace."""

    prompts: tuple[int, ...]
    """Quantiles of the lengths, at `SHARES`."""
    outputs: tuple[int, ...]
    rate: float
    """Requests per second, in the trace; 0 if it has no times."""
    gap_cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals."""
    in_bursts: bool = False
    """Whether minutes of work alternate with minutes without (`_minutes`); `gap_cv` is within a minute."""
    hit_rate: float = 0.0
    """Share of blocks of `CHUNK` tokens that came before, in a cache without limits."""


SHAPES = {
    "azure-code": Shape(
        (3, 17, 147, 578, 1469, 2745, 5194, 7315, 7436, 7437),
        (1, 6, 7, 9, 13, 24, 55, 90, 252, 480),
        rate=2.57,
        in_bursts=True,
    ),
    "azure-conv": Shape(
        (3, 29, 207, 396, 1020, 1189, 2735, 4083, 4142, 6300),
        (5, 16, 54, 85, 129, 395, 424, 451, 601, 1012),
        rate=5.53,
        gap_cv=1.09,
    ),
    "mooncake": Shape(
        (880, 894, 964, 2306, 6909, 15368, 27367, 39552, 85401, 87000),
        (1, 3, 24, 156, 350, 472, 597, 698, 1120, 3700),
        rate=3.40,
        hit_rate=0.366,
    ),
    "sharegpt": Shape(
        (4, 6, 21, 52, 136, 327, 602, 768, 964, 1024),
        (4, 7, 24, 50, 112, 246, 490, 725, 1307, 2035),
        rate=0.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When the requests of a generated trace come."""

    rate: float
    """Per second, in the mean."""
    duration: float
    """Seconds in which they come."""
    start: float = 0.0
    """Second of the day at which they begin."""
    daily: float = 0.0
    """The rate follows a day: most at 14 o'clock, by this share above the mean, least at 2."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf or not 0 < self.duration < math.inf:
            raise ConfigError("a generated trace needs a rate and a duration greater than 0.")
        if not 0 <= self.daily < 1:
            raise ConfigError(f"daily must be in [0, 1), got {self.daily}.")

    def rate_at(self, second: float) -> float:
        """Of the day."""
        return self.rate * (1 + self.daily * math.sin(2 * math.pi * (second / DAY - 1 / 3)))


def generate(name: str, arrivals: Arrivals, *, seed: int, longest: int) -> Iterator[TraceRequest]:
    """longest: the model's limit. Prompts are cut so that there is room for an answer, and answers at it."""
    if arrivals.rate * arrivals.duration > MOST_REQUESTS:
        raise ConfigError(
            f"{arrivals.rate:g} requests/s for {arrivals.duration:g} s are more than {MOST_REQUESTS:,} "
            "requests; lower rate or duration, or simulate a sample (sample_replicas, sample_windows)."
        )
    shape, lengths = SHAPES[name], random.Random(f"{seed}:lengths")
    prompts = Prefixes(shape.hit_rate, random.Random(f"{seed}:prefixes"))
    for time in times(shape, arrivals, random.Random(f"{seed}:arrivals")):
        prompt_len = min(_draw(shape.prompts, lengths), longest - 1)
        output_len = min(_draw(shape.outputs, lengths), longest - prompt_len)
        yield TraceRequest(time, prompts.make(prompt_len), output_len)


def _draw(quantiles: tuple[int, ...], dice: random.Random) -> int:
    share = dice.random()
    index = bisect_right(SHARES, share) - 1
    low, high = quantiles[index : index + 2]
    part = (share - SHARES[index]) / (SHARES[index + 1] - SHARES[index])
    return round(low * (high / low) ** part)


# --- when -----------------------------------------------------------------------------------------


def times(shape: Shape, arrivals: Arrivals, dice: random.Random) -> Iterator[float]:
    """Ascending, in [0, duration). Gaps have a gamma distribution with a mean of 1 on a clock that runs as
    fast as requests come."""
    form = 1 / shape.gap_cv**2
    at, until = _speed(shape, arrivals, dice)
    now = dice.expovariate(1.0) if shape.gap_cv == 1.0 else dice.gammavariate(form, 1 / form)
    while now < until:
        yield at(now)
        now += dice.gammavariate(form, 1 / form)


def _speed(
    shape: Shape, arrivals: Arrivals, dice: random.Random
) -> tuple[Callable[[float], float], float]:
    """How many requests come until when: a function from the first to the second, and all of them."""
    if not shape.in_bursts and not arrivals.daily:
        return (lambda number: number / arrivals.rate), arrivals.rate * arrivals.duration
    width = 60.0 if shape.in_bursts else min(60.0, arrivals.duration)
    edges = [width * index for index in range(math.ceil(arrivals.duration / width))]
    factors = _minutes(len(edges), dice) if shape.in_bursts else [1.0] * len(edges)
    sums = [0.0]
    for start, factor in zip(edges, factors, strict=True):
        end = min(start + width, arrivals.duration)
        middle = arrivals.start + (start + end) / 2
        sums.append(sums[-1] + factor * arrivals.rate_at(middle) * (end - start))

    def at(number: float) -> float:
        index = bisect_right(sums, number) - 1
        part = (number - sums[index]) / (sums[index + 1] - sums[index])
        return edges[index] + part * (min(edges[index] + width, arrivals.duration) - edges[index])

    return at, sums[-1]


def _minutes(number: int, dice: random.Random) -> list[float]:
    """Of each minute, how many times the mean rate it has. About a quarter of the time nothing comes, for two
    to six minutes; else the rate is lognormal. This gives what the trace of code has: gaps with a coefficient
    of variation of 13, and minutes with 0 to 4.1 times the mean, the median 0.72. Scaled to a mean of 1."""
    factors: list[float] = []
    while len(factors) < number:
        busy = max(1, round(dice.expovariate(1 / 12)))
        factors += [min(4.1, dice.lognormvariate(0.02, 0.75)) for _ in range(busy)]
        factors += [0.0] * dice.randint(2, 6)
    del factors[number:]
    return [factor * number / sum(factors) for factor in factors]


# --- what is shared -------------------------------------------------------------------------------


class Prefixes:
    """Conversations: a prompt begins with whole blocks of an earlier one, or is new. As many continue as give
    the share of blocks that came before. Of a few earlier ones, the longest that fits is continued; they are
    drawn among the latest so that each doubling of the distance is equally likely."""

    LATEST, DRAWN = 1024, 8

    def __init__(self, hit_rate: float, dice: random.Random) -> None:
        self._hit_rate, self._dice = hit_rate, dice
        self._contents = count(1)
        self._talks: deque[Runs] = deque(maxlen=self.LATEST)
        self._hits = self._blocks = 0

    def make(self, length: int) -> Runs:
        if not self._hit_rate:
            return ((next(self._contents), length),)
        self._blocks += -(-length // CHUNK)
        shared: Runs = ()
        if self._hits < self._hit_rate * self._blocks and self._talks:
            size = len(self._talks)
            drawn = [size - int(size ** self._dice.random()) for _ in range(self.DRAWN)]
            fits = [i for i in drawn if len(self._talks[i]) * CHUNK <= length]
            if fits:
                chosen = max(fits, key=lambda index: (len(self._talks[index]), index))
                shared = self._talks[chosen]
                del self._talks[chosen]
        self._hits += len(shared)
        own = [(next(self._contents), CHUNK) for _ in range(length // CHUNK - len(shared))]
        whole = (*shared, *own)
        self._talks.append(whole)
        rest = length % CHUNK
        return (*whole, (next(self._contents), rest)) if rest else whole


def at_rate(requests: list[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests at another rate: all gaps are longer or shorter by the same factor."""
    span = requests[-1].time
    if len(requests) < 2 or not span:
        raise ConfigError("a trace whose requests all come at once has no rate to change.")
    factor = (len(requests) - 1) / span / rate
    return [replace(request, time=request.time * factor) for request in requests]


def cut(requests: list[TraceRequest], longest: int) -> list[TraceRequest]:
    """To the model's limit, as `generate` does."""
    found = []
    for request in requests:
        left, runs = longest - 1, []
        for content, length in request.prompt:
            if left > 0:
                runs.append((content, min(length, left)))
            left -= length
        output_len = min(request.output_len, 1 + max(left, 0))
        found.append(TraceRequest(request.time, tuple(runs), output_len))
    return found

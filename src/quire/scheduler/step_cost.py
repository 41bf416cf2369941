"""The measured time of a step, as a function of the number of tokens that it samples: the part of the cost
model that has a knee.

A step that samples n tokens takes `level * shape(n)` seconds. The shape is learned slowly and per size, with
linear interpolation between the sizes that have occurred: it has a knee where reading the weights stops
to be the longest part, and steps where a kernel's block is full. The level follows what changes all steps
alike (longer contexts, another program on the machine), so that a size measured long ago stays comparable.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

LEVEL_RATE = 0.1
SHAPE_RATE = 0.02
"""For a size that occurs in every step; one that has not occurred for long is learned faster."""
MOST_SHAPE_RATE = 0.5
FIRST = 5
"""Of the first so many times of a size the median counts, and the level does not follow them."""
OUTLIER = 1.5
"""A time counts as at most so many times the expected one."""


class StepCost:
    def __init__(self) -> None:
        self._level = 0.0
        self._sizes: list[int] = []
        """The sizes that have occurred, ascending."""
        self._shape: dict[int, float] = {}
        self._first: dict[int, list[float]] = {}
        """The first times by size, relative to the level, until there are `FIRST`."""
        self._last: dict[int, int] = {}
        """By size, the step in which it occurred last."""
        self._num_steps = 0

    def start(self, seconds: Mapping[int, float]) -> None:
        """Begin with what is known, by the number of samples."""
        for size, each in seconds.items():
            for _ in range(FIRST if each > 0.0 else 0):
                self.observe(size, each)

    def observe(self, num_samples: int, seconds: float) -> None:
        """A step in which every token was sampled after."""
        size = _rounded(num_samples)
        if not self._level:
            self._level = seconds
        self._num_steps += 1
        age = self._num_steps - self._last.get(size, self._num_steps)
        self._last[size] = self._num_steps
        first = self._first.setdefault(size, [])
        if len(first) < FIRST:
            if not first:
                insort(self._sizes, size)
            insort(first, seconds / self._level)
            self._shape[size] = first[len(first) // 2]
            return
        shape = self._shape[size]
        seconds = min(seconds, OUTLIER * self._level * shape)
        rate = min(MOST_SHAPE_RATE, SHAPE_RATE * max(1.0, age**0.5))
        self._shape[size] += rate * (seconds / self._level - shape)
        if age <= FIRST:
            self._level += LEVEL_RATE * (seconds / shape - self._level)

    def knows(self, num_samples: int) -> bool:
        """Whether this size, or one a little smaller, has been measured."""
        size = _rounded(num_samples)
        at = bisect_left(self._sizes, size + 1)
        if not at:
            return False
        near = self._sizes[at - 1]
        return len(self._first[near]) >= 3 and near >= 0.75 * size

    def seconds(self, num_samples: int) -> float:
        return self._level * self._relative(num_samples)

    def _relative(self, num_samples: int) -> float:
        sizes, shape = self._sizes, self._shape
        if not sizes:
            return 1.0
        size = _rounded(num_samples)
        found = shape.get(size)
        if found is not None:
            # Within a rounded size as if it were exact, plus what the rest would cost.
            return (
                found if size == num_samples else found + self._slope(size) * (num_samples - size)
            )
        at = bisect_left(sizes, num_samples)
        if at == 0:  # less than all that occurred
            first = sizes[0]
            return shape[first] - _guess(first, shape[first]) * (first - num_samples)
        low = sizes[at - 1]
        if at == len(sizes):  # more than all that occurred
            return shape[low] + self._slope(low) * (num_samples - low)
        high = sizes[at]
        share = (num_samples - low) / (high - low)
        return shape[low] + share * (shape[high] - shape[low])

    def _slope(self, size: int) -> float:
        """What a token more costs above a size that occurred. Above the largest, as below it, but at least
        a part of the mean: there may be a knee."""
        sizes, shape = self._sizes, self._shape
        at = bisect_left(sizes, size)
        guess = _guess(size, shape[size])
        if at + 1 < len(sizes):
            above = sizes[at + 1]
            return max(0.0, (shape[above] - shape[size]) / (above - size))
        if not at:
            return guess
        below = sizes[at - 1]
        return max((shape[size] - shape[below]) / (size - below), 0.5 * guess)


def _rounded(num_samples: int) -> int:
    """Sizes above 16 in steps of a sixteenth to an eighth."""
    step = 1 << max(0, num_samples.bit_length() - 5)
    return num_samples // step * step


def _guess(size: int, seconds: float) -> float:
    """What a token more costs, before it is measured: for few tokens a part of the mean, for many, which are
    computed and no longer waited for, the mean."""
    return min(1.0, 0.3 + size / 32) * seconds / size

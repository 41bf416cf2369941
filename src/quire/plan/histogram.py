"""Percentiles of many values in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

PER_OCTAVE = 128
"""Buckets in which values may differ by 0.54 %."""


class Histogram:
    """Of times in seconds, exact in number and mean."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float, count: int = 1) -> None:
        key = round(math.log2(max(value, 1e-9)) * PER_OCTAVE)
        self._buckets[key] = self._buckets.get(key, 0) + count
        self.count += count
        self.total += value * count

    def merge(self, other: Histogram) -> None:
        for key, count in other._buckets.items():
            self._buckets[key] = self._buckets.get(key, 0) + count
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The middle of the bucket with this share of the values up to it."""
        wanted, seen, key = percent / 100 * self.count, 0, 0
        if not self.count:
            return 0.0
        for key in sorted(self._buckets):
            seen += self._buckets[key]
            if seen >= wanted:
                break
        return 2.0 ** (key / PER_OCTAVE)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly; 0 if there are none."""
    if not ordered:
        return 0.0
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

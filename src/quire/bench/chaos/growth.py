"""Whether memory, descriptors or threads grow over the run.

A leak is a trend; allocators and caches make steps and noise. So the slope is Theil and Sen's, the median of
the slopes of all pairs (robust while fewer than 29 % of the samples are outliers), over the samples after a
warm-up, and the growth is that slope times the span. It is a violation if it is above the bound, and the
median of the last third is above that of the first third by half the bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from quire.bench.chaos.processes import Sample

WARM_UP_SHARE = 0.25
"""Of a process's samples: caches and allocators fill."""
LEAST_SAMPLES = 9
"""After the warm-up; with fewer, nothing is said."""
MEMORY_BYTES, MEMORY_SHARE = 12 << 20, 0.05
"""Memory may grow by this much, whichever is more: bytes, or a share of its median."""
DESCRIPTORS, THREADS = 3, 3


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one figure of one process."""

    figure: str
    samples: int
    """After the warm-up."""
    first: float
    """Median of the first third."""
    last: float
    by_slope: float
    bound: float

    @property
    def is_too_much(self) -> bool:
        return (
            self.samples >= LEAST_SAMPLES
            and self.by_slope > self.bound
            and self.last - self.first > self.bound / 2
        )


def growths(samples: Sequence[tuple[float, Sample]]) -> list[Growth]:
    """Of a process with these (seconds, sample), in order of time."""
    if len(samples) < 2:
        return []
    memory = [float(sample.memory) for _, sample in samples]
    limits: Mapping[str, tuple[list[float], float]] = {
        "memory": (memory, max(MEMORY_BYTES, MEMORY_SHARE * median(memory))),
        "descriptors": ([float(sample.descriptors) for _, sample in samples], DESCRIPTORS),
        "threads": ([float(sample.threads) for _, sample in samples], THREADS),
    }
    times = [time for time, _ in samples]
    return [growth(name, times, values, bound) for name, (values, bound) in limits.items()]


def growth(figure: str, times: Sequence[float], values: Sequence[float], bound: float) -> Growth:
    start = int(len(values) * WARM_UP_SHARE)
    times, values = times[start:], values[start:]
    third = max(1, len(values) // 3)
    span = times[-1] - times[0]
    return Growth(
        figure,
        len(values),
        first=median(values[:third]),
        last=median(values[-third:]),
        by_slope=slope(times, values) * span,
        bound=bound,
    )


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's. 0 with fewer than two times."""
    step = max(1, len(times) // 400)  # pairs grow with the square
    points = list(zip(times, values, strict=True))[::step]
    slopes = [
        (later - earlier) / (end - start)
        for number, (start, earlier) in enumerate(points)
        for end, later in points[number + 1 :]
        if end > start
    ]
    return median(slopes) if slopes else 0.0

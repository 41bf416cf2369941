"""A leak is found through noise; a cache that fills, a step and noise alone are not leaks."""

from __future__ import annotations

from random import Random

import pytest

from quire.bench.chaos.growth import LEAST_SAMPLES, MEMORY_BYTES, growth, growths, slope
from quire.bench.chaos.processes import Sample

MIB = 1 << 20


def too_much(values, bound=10.0):
    return growth("memory", range(len(values)), values, bound).is_too_much


def noise(count, size=4.0):
    draw = Random(1)
    return [draw.uniform(-size, size) for _ in range(count)]


def test_a_leak_is_found_through_noise_and_outliers():
    values = [100 + 0.4 * n + wobble for n, wobble in enumerate(noise(80))]
    values[30] = values[60] = 500
    assert too_much(values)


@pytest.mark.parametrize(
    "values",
    [
        [100 + wobble for wobble in noise(80)],
        [100 + 40 * min(1, n / 15) + wobble for n, wobble in enumerate(noise(80))],  # warms up
        [100.0] * 75 + [500.0] * 5,  # a peak at the end
        [100 - n for n in range(80)],
        [100.0 + 30 * n for n in range(LEAST_SAMPLES - 1)],  # too few to say
    ],
    ids=["noise", "warm-up", "peak", "less", "few"],
)
def test_what_is_no_leak(values):
    assert not too_much(values)


def test_the_slope_is_that_of_the_line():
    assert slope([0, 1, 2, 5], [3, 5, 7, 13]) == 2
    assert slope([1], [1]) == 0


def test_a_thousand_samples_take_no_longer_than_the_run():
    times = range(2000)
    assert slope(times, [0.5 * time for time in times]) == pytest.approx(0.5)


@pytest.mark.parametrize("figure", ["memory", "descriptors", "threads"])
def test_each_figure_of_a_process(figure):
    flat = Sample(memory=200 * MIB, descriptors=20, threads=5)
    samples = []
    for n in range(40):
        values = {"memory": flat.memory, "descriptors": flat.descriptors, "threads": flat.threads}
        values[figure] += n * (MEMORY_BYTES // 10 if figure == "memory" else 1)
        samples.append((float(n), Sample(**values)))
    assert [each.figure for each in growths(samples) if each.is_too_much] == [figure]
    assert not [each for each in growths([(0.0, flat), (1.0, flat)]) if each.is_too_much]

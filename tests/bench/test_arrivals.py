"""When requests are due."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.arrivals import arrival_times, gap_rates
from quire.bench.options import LoadOptions

RATES = st.floats(0.01, 1e4)


@given(RATES, st.floats(0.1, 1000), st.integers(1, 300), st.integers(0, 2**32))
def test_a_schedule_is_ordered_exact_and_repeatable(
    rate: float, burstiness: float, count: int, seed: int
) -> None:
    options = LoadOptions(request_rate=rate, burstiness=burstiness)
    times = arrival_times(options, count, seed=seed)
    assert len(times) == count and times[0] == 0.0
    assert all(early <= late for early, late in itertools.pairwise(times))
    assert times[-1] == pytest.approx((count - 1) / rate)
    assert times == arrival_times(options, count, seed=seed)


def test_at_an_infinite_rate_all_are_due_at_once() -> None:
    assert arrival_times(LoadOptions(), 5, seed=0) == [0.0] * 5


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    """A gamma distribution's coefficient of variation is one over the root of its shape."""
    options = LoadOptions(request_rate=10, burstiness=burstiness)
    gaps = np.diff(arrival_times(options, 50_001, seed=1))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


@given(RATES, RATES, st.sampled_from(["linear", "exponential"]), st.integers(3, 200))
def test_a_ramp_goes_from_start_to_end(start: float, end: float, strategy: str, count: int) -> None:
    options = LoadOptions(ramp_up_strategy=strategy, ramp_up_start_rps=start, ramp_up_end_rps=end)
    rates = gap_rates(options, count)
    assert len(rates) == count - 1
    assert rates[0] == pytest.approx(start) and rates[-1] == pytest.approx(end)
    steps = np.diff(np.log(rates) if strategy == "exponential" else rates)
    assert np.allclose(steps, steps[0], rtol=1e-4, atol=1e-9 * max(start, end))
    assert len(arrival_times(options, count, seed=0)) == count


def test_one_request_needs_no_gap() -> None:
    assert arrival_times(LoadOptions(request_rate=3), 1, seed=0) == [0.0]
    assert math.isinf(LoadOptions().request_rate)

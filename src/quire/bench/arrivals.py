"""When each request is due: fixed before the run, and a function of the seed.

The load is open-loop: as with real users, a slow server does not slow the arrivals down. A generator that
waits for answers before it sends hides the very delays that it should measure (coordinated omission).
`--max-concurrency` closes the loop, so latencies are reported from the due time as well.
"""

from __future__ import annotations

import math

from quire.bench.options import LoadOptions


def arrival_times(options: LoadOptions, count: int, *, seed: int) -> list[float]:
    """Seconds from the start at which request 0, 1, ... is due: [count], from 0, non-decreasing.

    Gaps are drawn from a gamma distribution with shape `burstiness` and mean `1 / rate`: coefficient of
    variation `1 / sqrt(burstiness)`. With a constant rate they are then scaled so that the last request
    is due at `(count - 1) / rate`: for every seed, the mean rate is exactly `rate`.
    """
    import numpy as np

    rates = gap_rates(options, count)
    if not rates:
        return [0.0] * count
    draws = np.random.default_rng(seed).gamma(
        options.burstiness, 1 / options.burstiness, size=len(rates)
    )
    gaps = draws / np.asarray(rates)
    total = float(gaps.sum())
    if options.ramp_up_strategy is None and total > 0:
        gaps *= (len(rates) / options.request_rate) / total
    return [0.0, *np.cumsum(gaps).tolist()]


def gap_rates(options: LoadOptions, count: int) -> list[float]:
    """The rate of each of the `count - 1` gaps; empty if all requests are due at once.

    A ramp goes from start to end with the request's number: linearly, or by a constant factor.
    """
    num_gaps = max(count - 1, 0)
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    if options.ramp_up_strategy is None or start is None or end is None:
        return [] if options.request_rate == math.inf else [options.request_rate] * num_gaps
    last = max(num_gaps - 1, 1)
    if options.ramp_up_strategy == "linear":
        return [start + (end - start) * i / last for i in range(num_gaps)]
    return [start * (end / start) ** (i / last) for i in range(num_gaps)]

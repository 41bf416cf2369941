"""Several replicas: one clock, routing, autoscaling, and what a sample says of the whole."""

from __future__ import annotations

import random
from typing import Any

import pytest

from quire.plan.fleet import ROUTINGS, Autoscale, Fleet, Run
from quire.plan.histogram import Histogram, percentile
from quire.plan.replica import Replica
from quire.plan.traces import TraceRequest
from tests.plan.simulated import Linear, drive, limits, make_replica


def replica(**options: Any) -> Replica:
    rules = limits(max_num_batched_tokens=256, max_model_len=2048)
    return make_replica(rules, 600, **options)


def traffic(count: int, rate: float, *, seed: int = 0, groups: int = 0) -> list[TraceRequest]:
    """groups: so many long prefixes, of which each request has one."""
    dice, now, found = random.Random(seed), 0.0, []
    for number in range(count):
        now += dice.expovariate(rate)
        shared = ((1 + dice.randrange(groups), 480),) if groups else ()
        own = (100 + number, dice.randint(10, 200))
        found.append(TraceRequest(now, (*shared, own), dice.randint(1, 120)))
    return found


def run(requests: list[TraceRequest], size: int, **options: Any) -> Run:
    replicas = {key: options.pop(key) for key in ("jumps",) if key in options}
    return Fleet(lambda: replica(**replicas), size, **options).run(requests)


def ends(found: Run) -> dict[int, tuple[float, float]]:
    return {life.number: (life.first, life.last) for life in found.lives}


def test_one_replica_is_a_replica() -> None:
    requests = traffic(60, 3.0)
    alone = drive(replica(), requests)
    assert ends(run(requests, 1)) == {life.number: (life.first, life.last) for life in alone}  # type: ignore[attr-defined]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_jumps_change_nothing_in_a_fleet(routing: str) -> None:
    """An arrival may end a stretch of one replica while the others go on."""
    requests = traffic(150, 12.0, groups=5)
    stepped = run(requests, 3, routing=routing, jumps=False)
    jumped = run(requests, 3, routing=routing)
    assert ends(jumped) == ends(stepped)
    assert len(ends(jumped)) == 150
    assert jumped.counts.jumped and not stepped.counts.jumped
    assert jumped.counts.steps == stepped.counts.steps


def test_by_turns_is_by_turns() -> None:
    requests = traffic(60, 10.0)
    together = ends(run(requests, 2, routing="round-robin"))
    for first in (0, 1):
        mine = dict(enumerate(requests[first::2]))
        alone = drive(replica(), list(mine.values()))
        for life in alone:
            number = 2 * life.number + first  # type: ignore[attr-defined]
            assert together[number] == (life.first, life.last)  # type: ignore[attr-defined]


def test_the_router_finds_prefixes() -> None:
    requests = traffic(200, 6.0, groups=8)

    def found(routing: str) -> int:
        return sum(life.cached for life in run(requests, 4, routing=routing).lives)

    assert found("prefix") > 1.1 * found("round-robin")


def test_the_least_load_waits_less_than_chance() -> None:
    requests = traffic(300, 16.0)

    def mean(routing: str) -> float:
        lives = run(requests, 4, routing=routing).lives
        return sum(life.first - life.request.time for life in lives) / len(lives)

    assert mean("least-load") < mean("random")


def test_a_request_that_comes_when_a_step_ends_is_in_the_next() -> None:
    step = Linear(constant=0.25, row=0.0, context=0.0, token=0.0)
    requests = [TraceRequest(0.0, ((1, 10),), 4), TraceRequest(0.25, ((2, 10),), 4)]
    for jumps in (False, True):
        found = Fleet(lambda jumps=jumps: replica(step=step, jumps=jumps), 1).run(requests)  # type: ignore[misc]
        assert [life.admitted for life in found.lives] == [0.0, 0.25]


def test_a_request_comes_to_its_scheduler_later() -> None:
    requests = [TraceRequest(1.0, ((1, 10),), 2)]
    (late,) = run(requests, 1, delay=0.25).lives
    (soon,) = run(requests, 1).lives
    assert late.first == pytest.approx(soon.first + 0.25)


def test_replicas_come_with_the_load_and_go_after_it() -> None:
    quiet, busy = traffic(40, 0.5, seed=1), traffic(900, 16.0, seed=2)
    start = quiet[-1].time
    middle = [TraceRequest(start + r.time, r.prompt, r.output_len) for r in busy]
    end = middle[-1].time
    late = [TraceRequest(end + r.time, r.prompt, r.output_len) for r in quiet]
    rule = Autoscale(1, 6, 2.0, interval=5.0, start_delay=10.0, patience=20.0)
    found = Fleet(replica, 1, autoscale=rule).run([*quiet, *middle, *late])
    assert len(found.lives) == len(quiet) + len(middle) + len(late)
    sizes = [size for _, size in found.sizes]
    assert sizes[0] == 1
    assert max(sizes) > 2
    assert sizes[-1] == 1
    first = next(time for time, size in found.sizes if size > 1)
    assert start + 10.0 <= first < start + 60.0
    assert next(time for time, size in reversed(found.sizes) if size > 1) < end + 60.0
    assert found.end < found.paid < 6 * found.end
    fixed = Fleet(replica, 6).run([*quiet, *middle, *late])
    assert found.paid < 0.7 * fixed.paid == pytest.approx(0.7 * 6 * fixed.end)


def test_a_part_of_a_fleet_is_like_the_whole() -> None:
    """A fifth of the replicas with a fifth of the traffic."""
    step = Linear(constant=0.02)

    def mean(size: int, seed: int) -> float:
        requests = traffic(120 * size, 1.2 * size, seed=seed)
        fleet = Fleet(lambda: replica(step=step), size, routing="least-load")
        lives = fleet.run(requests).lives
        return sum(life.last - life.request.time for life in lives) / len(lives)

    assert mean(2, 1) == pytest.approx(mean(10, 2), rel=0.1)


def test_percentiles_of_many_values() -> None:
    dice = random.Random(0)
    values = sorted(dice.lognormvariate(-4, 1) for _ in range(5000))
    histogram, half = Histogram(), Histogram()
    for value in values[::2]:
        histogram.add(value)
    for value in values[1::2]:
        half.add(value)
    histogram.merge(half)
    for percent in (1, 50, 90, 99, 100):
        assert histogram.percentile(percent) == pytest.approx(
            percentile(values, percent), rel=0.006
        )
    assert histogram.mean == pytest.approx(sum(values) / 5000)
    assert Histogram().percentile(50) == percentile([], 50) == 0.0
    assert percentile([1.0, 2.0, 4.0], 75) == 3.0

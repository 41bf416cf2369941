"""Latencies and rates from the time of steps."""

from __future__ import annotations

import random

import pytest

from quire.plan.load import Lengths, Replica
from quire.scheduler.cost_model import Work


class Linear:
    """10 ms a step, 0.1 a row, 0.02 a token of a prompt."""

    is_bound = False

    def seconds(self, work: Work) -> float:
        return 0.01 + 1e-4 * work.rows + 2e-5 * work.prompt_tokens


REPLICA = Replica(Linear(), Lengths(1000, 200), seats=64, budget=2048, overhead=0.005)


def test_steps_compute_what_requests_bring() -> None:
    for lengths in (Lengths(1000, 200), Lengths(7000, 300), Lengths(10, 500), Lengths(300, 10)):
        replica = Replica(Linear(), lengths, seats=64, budget=2048)
        for rows in (1.0, 7.5, replica.most_rows * 0.9):
            pieces = replica.pieces(rows)
            assert sum(share for share, _ in pieces) == pytest.approx(1.0, abs=1e-5)
            mean = rows * lengths.prompt / lengths.output
            expected = 0.01 + 1e-4 * rows + 2e-5 * mean
            assert sum(share * seconds for share, seconds in pieces) == pytest.approx(expected)


def test_littles_law_and_the_saturation_rate() -> None:
    point = REPLICA.at(10.0)
    assert point is not None
    assert point.rate == pytest.approx(10.0)
    assert point.rows == pytest.approx(10.0 * 200 * point.itl)
    assert REPLICA.most_rows == 64
    assert REPLICA.saturation == pytest.approx(64 / (200 * (0.01 + 0.0064 + 2e-5 * 64 * 5)))
    assert REPLICA.at(REPLICA.saturation) is None
    assert REPLICA.at(REPLICA.saturation * 0.999) is not None


def test_the_budget_may_be_what_limits() -> None:
    replica = Replica(Linear(), Lengths(8000, 100), seats=64, budget=2048)
    assert replica.most_rows == pytest.approx(2048 / 81)


def test_more_load_is_never_faster() -> None:
    points = [REPLICA.at(REPLICA.saturation * share / 20) for share in range(1, 20)]
    for name in ("rows", "itl", "itl_p99", "ttft", "ttft_p99"):
        values = [getattr(point, name) for point in points]
        assert values == sorted(values), name
    for point in points:
        assert point is not None
        assert point.ttft_p99 > point.ttft > 0.005 + 0.01 + 2e-5 * 1000


def test_a_prompt_alone_is_its_steps() -> None:
    steps = Replica(Linear(), Lengths(5000, 1), seats=1, budget=2048).alone()
    assert [work.prompt_tokens for work in steps] == [2048, 2048, 904]
    assert sum(work.prompt_contexts for work in steps) == 5000 * 5000 / 2


def test_the_two_prices_add_up_to_the_device() -> None:
    per_prompt, per_output = REPLICA.device_seconds(32)
    total = per_prompt * 1000 + per_output * 200
    assert total == pytest.approx(REPLICA.mean_step(32) * 200 / 32)
    assert per_output > per_prompt


def test_rates_and_latencies_are_near_a_simulated_queue() -> None:
    """A loop of steps with random arrivals: the same budget, seats and step time."""
    rng, clock, due = random.Random(1), 0.0, 0.0
    rate = 0.6 * REPLICA.saturation
    waiting: list[list[float]] = []
    running: list[int] = []
    ttft, gaps, finished = [], [], 0
    while finished < 4000:
        while due <= clock:
            waiting.append([due, 1000.0])
            due += rng.expovariate(rate)
        if not running and not waiting:
            clock = due
            continue
        room, begun = float(2048 - len(running)), []
        for request in waiting:
            if len(running) + len(begun) == 64 or room < 1:
                break
            taken = min(room, request[1])
            request[1] -= taken
            room -= taken
            begun += [request] if not request[1] else []
        step = Linear().seconds(Work(len(running), 0, 1, 2048 - len(running) - room, 0))
        clock += step
        gaps += [step] * len(running)
        running = [left - 1 for left in running if left > 1]
        finished += len(begun)
        for request in begun:
            waiting.remove(request)
            running.append(199)
            ttft.append(clock - request[0])
    point = REPLICA.at(rate)
    assert point is not None
    assert point.itl == pytest.approx(sum(gaps) / len(gaps), rel=0.1)
    assert point.ttft - 0.005 == pytest.approx(sum(ttft) / len(ttft), rel=0.1)

"""The predicted wait, compared with what happens, on the real scheduler in simulated time."""

from __future__ import annotations

import random
import statistics

import pytest

from quire.messages import LoadStats
from quire.scheduler.cost_model import Work
from quire.scheduler.load import seats_needed, tokens_before, wait_seconds
from tests.scheduler.requests import add_request
from tests.scheduler.timed import LONG, M2, TimedEngine


def load_of(engine: TimedEngine) -> LoadStats:
    """As of now, and not of up to a tenth of a second ago."""
    engine.scheduler.load._next = 0.0
    return engine.scheduler.take_stats().load


CASES = {
    # seats, prompts, outputs, blocks, queue
    "prompts are the bottleneck": (64, (500, 3000), (4, 20), 20_000, 40),
    "seats are": (8, (20, 200), (50, 300), 20_000, 40),
    "blocks are": (64, (400, 1200), (50, 200), 700, 30),
    "mixed": (16, (100, 2000), (20, 200), 20_000, 60),
}


@pytest.mark.parametrize("target", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_the_predicted_wait_is_right_within_thirty_percent_in_the_median(
    case: str, target: float
) -> None:
    """Requests come so that about `queue` wait. The wait of every fifth is predicted when it comes."""
    seats, prompts, outputs, num_blocks, queue = CASES[case]
    longest = min(LONG, 16 * (num_blocks - 1))
    engine = TimedEngine(target, seats=seats, num_blocks=num_blocks, longest=longest, seed=3)
    chance, number = random.Random(7), 0
    predicted: dict[int, tuple[float, float]] = {}
    errors: list[float] = []
    while len(errors) < 15:
        while len(engine.scheduler.waiting) < queue:
            number += 1
            if engine.step > 200 and number % 5 == 0:
                predicted[number] = (engine.now, load_of(engine).wait_seconds)
            engine.add(number, chance.randint(*prompts), chance.randint(*outputs))
        engine.step_once()
        assert engine.step < 5000
        for request_id in predicted.keys() & engine.started.keys():
            asked, wait = predicted.pop(request_id)
            errors.append(abs(wait / (engine.started[request_id] - asked) - 1))
    assert statistics.median(errors) <= 0.3


def test_beside_one_long_prompt_nobody_waits_long() -> None:
    engine = TimedEngine(0.1)
    for request_id in range(4):
        engine.add(request_id, 100, 3000)
    engine.run(20)
    engine.add(100, LONG)
    engine.run(20)
    load = load_of(engine)
    assert load.first_tokens > 20_000 and load.queue_tokens == 0
    assert load.wait_seconds == 0.0 and load.free_seats == 59
    engine.add(101, 50)
    load = load_of(engine)
    assert load.queue_tokens == 50 and 0.0 < load.wait_seconds < 1.0


def test_what_the_cache_holds_is_not_queued_work() -> None:
    engine = TimedEngine(seats=2)
    for request_id in range(20):
        message = add_request(request_id, [*range(1600), request_id], max_tokens=2)
        engine.add_message(message)
        engine.run(3)
    for request_id in range(20, 30):
        message = add_request(request_id, [*range(1600), request_id], max_tokens=2)
        engine.add_message(message)
    load = load_of(engine)
    assert load.uncached < 0.2
    assert load.queue_tokens == pytest.approx(10 * 1601 * load.uncached, abs=1)


def test_forks_of_a_request_do_not_queue_its_prompt_again() -> None:
    engine = TimedEngine(seats=1)
    engine.add(1, 100, 50)
    engine.run(3)
    engine.add(2, 400)
    engine.add_message(add_request(3, [1002] * 400, fork_of=2, max_tokens=8))
    assert load_of(engine).queue_tokens == 400


def test_an_idle_engine_says_so_at_once() -> None:
    engine = TimedEngine(cost=Work(*(each / 1000 for each in M2)))
    engine.add(1, 100, 4)
    engine.scheduler.take_stats()
    assert engine.scheduler.take_stats().load.queue_tokens == 100
    while engine.scheduler.has_work:
        engine.step_once()
    assert engine.now < 0.1, "the interval is not over"
    load = engine.scheduler.take_stats().load
    assert load.queue_tokens == load.first_tokens == 0 and load.wait_seconds == 0.0


def test_the_formulas() -> None:
    load = LoadStats(first_tokens=900, free_seats=2, prompt_rate=100.0, end_rate=0.5)
    assert tokens_before(load, 100) == 400, "the queue has a quarter beside running prompts"
    assert tokens_before(load, 1000) == 1900
    assert [seats_needed(load, waiting) for waiting in (0, 1, 2, 5)] == [0, 0, 1, 4]
    assert wait_seconds(load, 400, 1) == 4.0 and wait_seconds(load, 100, 3) == 6.0
    assert wait_seconds(LoadStats(), 400, 7) == 0.0, "nothing was measured"

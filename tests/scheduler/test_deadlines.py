"""Requests whose deadlines pass: nothing is computed for those that wait, and blocks of others are freed."""

from __future__ import annotations

import random

import pytest

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, FinishReason
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.deadlines import Deadlines
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request


class Engine:
    def __init__(
        self, policy: str = "fcfs", *, max_in_flight: int = 1, num_blocks: int = 40
    ) -> None:
        self.now = 0.0
        limits = SchedulerLimits(2, 16, 64, policy=policy)
        kv = KVCacheManager(num_blocks, 4, enable_prefix_caching=False)
        self.scheduler = Scheduler(limits, kv, clock=lambda: self.now)
        self.executor = MockExecutor(lambda request_id, index: 7, max_in_flight=max_in_flight)
        self.core = EngineCore(self.scheduler, self.executor, clock=lambda: self.now)
        self.tokens: dict[int, int] = {}
        self.ends: dict[int, FinishReason] = {}

    def add(self, request_id: int, length: int = 8, tokens: int = 8, **fields: object) -> None:
        prompt = [request_id] * length
        self.core.handle(add_request(request_id, prompt, max_tokens=tokens, **fields))

    def step(self, seconds: float = 1.0) -> None:
        self.now += seconds
        outputs = self.core.step()
        for update in outputs.updates:
            self.tokens[update.request_id] = self.tokens.get(update.request_id, 0) + len(
                update.new_token_ids
            )
            if update.finish_reason is not None:
                assert update.request_id not in self.ends
                self.ends[update.request_id] = update.finish_reason
        check_invariants(self.scheduler)

    def finish(self) -> None:
        for _ in range(200):
            if not self.core.has_work:
                break
            self.step()
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_usable

    def rows(self, request_id: int) -> int:
        return sum(row.request_id == request_id for p in self.executor.plans for row in p.rows)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_one_that_is_queued_ends_without_work(policy) -> None:
    engine = Engine(policy)
    for request_id in (1, 2):
        engine.add(request_id, tokens=20)
    engine.add(3, deadline=5.0)
    engine.finish()
    assert engine.ends[3] is FinishReason.EXPIRED and not engine.rows(3)
    assert engine.ends[1] is engine.ends[2] is FinishReason.LENGTH


def test_one_that_comes_too_late_is_never_planned() -> None:
    engine = Engine()
    engine.now = 10.0
    engine.add(1, deadline=9.0)
    engine.step()
    assert engine.ends == {1: FinishReason.EXPIRED} and not engine.rows(1)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_one_that_runs_ends_with_what_it_has(max_in_flight) -> None:
    engine = Engine(max_in_flight=max_in_flight)
    engine.add(1, tokens=40, deadline=6.0)
    engine.add(2, tokens=20)
    while 1 not in engine.ends:
        free = engine.scheduler.kv.num_free
        engine.step()
    assert engine.now == 6.0 and engine.ends[1] is FinishReason.TIMEOUT
    assert engine.scheduler.kv.num_free > free
    assert 0 < engine.tokens[1] <= 6
    engine.finish()
    assert engine.tokens[2] == 20


def test_one_in_its_prompt() -> None:
    engine = Engine()
    engine.add(1, 60, 4, deadline=2.5)
    engine.finish()
    assert engine.ends == {1: FinishReason.TIMEOUT} and engine.tokens[1] == 0


def test_one_that_was_preempted_has_run() -> None:
    engine = Engine(num_blocks=18)
    engine.add(1, 24, 30)
    engine.add(2, 24, 30, deadline=20.0)
    while not engine.scheduler.waiting:
        engine.step()
    engine.finish()
    assert engine.ends[2] is FinishReason.TIMEOUT and engine.tokens[2] > 0


def test_one_that_ends_in_time() -> None:
    engine = Engine()
    engine.add(1, tokens=2, deadline=100.0)
    engine.add(2, tokens=2, deadline=100.0)
    engine.step()
    engine.core.handle(AbortRequests([2]))
    engine.finish()
    engine.now = 200.0
    assert engine.ends[1] is FinishReason.LENGTH
    assert not engine.core._deadlines


def test_without_deadlines_the_clock_is_not_asked() -> None:
    asked = []
    engine = Engine()
    engine.core._clock = lambda: asked.append(1) or 0.0
    engine.add(1)
    engine.core.step()
    assert len(asked) == 1  # for the outputs


def test_only_what_is_left_is_kept() -> None:
    rng = random.Random(3)
    deadlines, live = Deadlines(), {}
    for step in range(3000):
        live[step] = rng.uniform(step, step + 500)
        deadlines.add(step, live[step])
        if rng.random() < 0.9:
            request_id = rng.choice(list(live))
            del live[request_id]
            deadlines.ended(request_id)
        passed = deadlines.passed(float(step))
        assert sorted(passed) == sorted(i for i, at in live.items() if at <= step)
        for request_id in passed:
            del live[request_id]
        assert bool(deadlines) == bool(live)
        assert len(deadlines._heap) <= 2 * len(live) + 65

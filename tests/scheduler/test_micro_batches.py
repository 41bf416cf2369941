"""How busy the stages of a pipeline are: the real scheduler, over stages that take simulated time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import mean

import pytest

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import SampledRow, StepPlan, StepResult
from quire.scheduler import Scheduler, SchedulerLimits
from tests.scheduler.requests import add_request


class Stages(MockExecutor):
    """Each stage computes one plan after the other, in `base` seconds and `token` seconds per token. The
    last one computes in the caller's time, as it is in the scheduler's process."""

    def __init__(self, depth: int, *, base: float, token: float) -> None:
        super().__init__(lambda request_id, index: 7, max_in_flight=depth)
        self.base, self.token = base, token
        self.now = 0.0
        self.free = [0.0] * depth
        self.busy = 0.0

    def execute(self, plan: StepPlan) -> InStages:
        super().execute(plan)
        seconds = self.base + self.token * plan.num_tokens if plan.rows else 0.0
        arrives = self.now
        for stage in range(len(self.free) - 1):
            arrives = self.free[stage] = max(self.free[stage], arrives) + seconds
        self.busy += seconds * len(self.free)
        return InStages(self, plan, arrives, seconds)


@dataclass(frozen=True, slots=True)
class InStages:
    stages: Stages
    plan: StepPlan
    arrives: float
    seconds: float

    def result(self) -> StepResult:
        self.stages.now = max(self.stages.now, self.arrives) + self.seconds
        rows = [row for row in self.plan.rows if row.samples]
        sampled = [SampledRow(request_id=row.request_id, token_ids=[7]) for row in rows]
        return StepResult(step_id=self.plan.step_id, sampled=sampled)


class Pipeline:
    """shares: whether rows are divided among plans. Else each plan takes all that are ready."""

    def __init__(
        self, depth: int, *, shares: bool = True, base: float = 10.0, token: float = 0.3
    ) -> None:
        limits = SchedulerLimits(
            max_num_seqs=128,
            max_num_batched_tokens=2048,
            max_model_len=5000,
            stages=depth if shares else 1,
        )
        # Enough for all at once: 120 requests of 1,100 tokens. More would only take time to make.
        kv = KVCacheManager(9_000, 16, enable_prefix_caching=False)
        self.executor = Stages(depth, base=base, token=token)
        scheduler = Scheduler(limits, kv, needs_token_before_next=lambda message: True)
        self.core = EngineCore(scheduler, self.executor)
        self.arrivals: list[tuple[float, int, int]] = []
        self.first: dict[int, float] = {}
        self.num_tokens = 0

    def add(self, at: float, prompt: int, max_tokens: int) -> None:
        self.arrivals.append((at, prompt, max_tokens))

    def step(self) -> None:
        arrived = len(self.first)
        while arrived < len(self.arrivals) and self.arrivals[arrived][0] <= self.executor.now:
            _, prompt, max_tokens = self.arrivals[arrived]
            self.core.handle(add_request(arrived, [arrived] * prompt, max_tokens=max_tokens))
            self.first[arrived] = 0.0
            arrived += 1
        if not self.core.has_work:
            self.executor.now = self.arrivals[arrived][0]
            return
        for update in self.core.step().updates:
            self.num_tokens += len(update.new_token_ids)
            if not self.first[update.request_id]:
                since = self.executor.now - self.arrivals[update.request_id][0]
                self.first[update.request_id] = since

    def copy(self, *, shares: bool) -> Pipeline:
        """With the same stages and requests."""
        stages = self.executor
        other = Pipeline(len(stages.free), shares=shares, base=stages.base, token=stages.token)
        other.arrivals = list(self.arrivals)
        return other

    def run(self) -> Pipeline:
        while len(self.first) < len(self.arrivals) or self.core.has_work:
            self.step()
        return self

    @property
    def seconds(self) -> float:
        return self.executor.now

    @property
    def utilization(self) -> float:
        """The part of the time in which a stage computes."""
        return self.executor.busy / (self.executor.now * len(self.executor.free))

    def rows(self) -> list[int]:
        return [len(plan.rows) for plan in self.executor.plans]


DEPTHS = pytest.mark.parametrize("depth", [2, 3, 4])


@DEPTHS
def test_decoding_rows_are_divided_evenly(depth: int) -> None:
    engine = Pipeline(depth)
    for _ in range(64):
        engine.add(0.0, 10, 100)
    engine.run()
    steady = engine.rows()[10 * depth : -20 * depth]
    assert max(steady) - min(steady) < depth
    assert engine.utilization > 0.95
    assert engine.copy(shares=False).run().utilization < 1.1 / depth


@DEPTHS
def test_the_division_stays_even_when_requests_end(depth: int) -> None:
    chance = random.Random(depth)
    engine = Pipeline(depth)
    for _ in range(96):
        engine.add(0.0, 10, chance.randrange(20, 400))
    engine.run()
    steady = engine.rows()[50:-100]
    for rows in zip(*(steady[first:] for first in range(depth)), strict=False):
        assert max(rows) - min(rows) <= 4
    assert engine.utilization > 0.93


@DEPTHS
@pytest.mark.parametrize("base", [0.1, 10.0])
@pytest.mark.parametrize("rate", [0.002, 0.1])
def test_prompts_that_arrive_do_not_leave_stages_idle(depth: int, base: float, rate: float) -> None:
    chance = random.Random(0)
    engine, now = Pipeline(depth, base=base), 0.0
    for _ in range(120):
        now += chance.expovariate(rate)
        engine.add(now, chance.randrange(100, 1000), chance.randrange(20, 100))
    everybody = engine.copy(shares=False).run()
    engine.run()
    assert mean(engine.first.values()) < mean(everybody.first.values())
    assert engine.seconds <= everybody.seconds
    if rate == 0.1:
        assert engine.utilization > 0.9


@DEPTHS
@pytest.mark.parametrize("base", [0.0, 5.0, 19.0])
def test_a_prompt_alone_is_never_slower(depth: int, base: float) -> None:
    """And its chunks follow each other."""
    for prompt in (1, 50, 100, 200, 500, 1000, 4500):
        engine = Pipeline(depth, base=base)
        engine.add(0.0, prompt, 1)
        everybody = engine.copy(shares=False).run()
        engine.run()
        assert engine.seconds <= everybody.seconds
        if prompt >= 500:
            assert engine.seconds < 0.95 * everybody.seconds


@DEPTHS
@pytest.mark.parametrize("token", [0.0, 0.3])
def test_few_rows_are_never_slower(depth: int, token: float) -> None:
    for rows in (1, 2, 3, 4, 6, 9):
        engine = Pipeline(depth, token=token)
        for _ in range(rows):
            engine.add(0.0, 10, 30)
        everybody = engine.copy(shares=False).run()
        engine.run()
        assert engine.seconds <= 1.02 * everybody.seconds + 3 * depth * engine.executor.base

"""The simulated replica is the engine: the ledger of a real core, and jumps that change nothing."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.executor.base import StepFuture
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, StepPlan, StepResult
from quire.plan.replica import Clock, Replica
from quire.plan.traces import TraceRequest
from quire.scheduler import DecisionKind, DecisionLog, Scheduler, SchedulerLimits
from quire.scheduler.cost_model import work_of
from tests.plan.simulated import Linear, drive, limits, make_replica
from tests.scheduler.fake_executor import CheckingExecutor

Step = tuple[int, tuple[tuple[int, int, int], ...]]
"""Blocks in use once a step is planned, and its rows."""


def trace(dice: random.Random, count: int, *, pace: float, longest: int) -> list[TraceRequest]:
    """Requests that come in clusters, some of which begin alike."""
    now, found = 0.0, []
    for number in range(count):
        now += dice.choice([0.0, dice.expovariate(1 / pace), dice.expovariate(1 / pace / 8)])
        shared = dice.choice([0, 0, 16, 40])
        prompt = ((1 + dice.randrange(3), shared), (100 + number, dice.randint(1, 60)))
        runs = tuple(run for run in prompt if run[1])
        room = longest - sum(length for _, length in runs)
        found.append(TraceRequest(now, runs, dice.randint(1, min(room, dice.choice([8, 120])))))
    return found


# --- the ledger: a real core, with tokens that are checked ----------------------------------------


class TimedExecutor(CheckingExecutor):
    """Carries plans out on a device that takes virtual seconds, and is waited for."""

    def __init__(self, clock: Clock, num_blocks: int, depth: int) -> None:
        super().__init__(num_blocks, 16, max_in_flight=depth, vocab_size=1000)
        self._clock, self._free = clock, 0.0

    def execute(self, plan: StepPlan) -> StepFuture:  # type: ignore[override]
        result = super().execute(plan).result()
        seconds = Linear().seconds(work_of(plan.rows)) if plan.rows else 0.0
        self._free = max(self._clock.now, self._free) + seconds
        return Waited(self._clock, self._free, result)


class Waited:
    def __init__(self, clock: Clock, done: float, result: StepResult) -> None:
        self._clock, self._done, self._result = clock, done, result

    def result(self) -> StepResult:
        self._clock.now = max(self._clock.now, self._done)
        return self._result


def real_run(
    rules: SchedulerLimits, num_blocks: int, requests: list[TraceRequest], depth: int
) -> list[Step]:
    """The steps of an `EngineCore` to which requests come at their times."""
    clock, steps = Clock(), []
    kv = KVCacheManager(num_blocks, 16, enable_prefix_caching=True)
    executor = TimedExecutor(clock, num_blocks, depth)
    core = EngineCore(Scheduler(rules, kv, clock=clock), executor, clock=clock)  # type: ignore[arg-type]
    executor.on_plan = lambda plan: steps.append(seen(kv, plan))
    left = deque(enumerate(requests))
    while left or core.has_work:
        if not core.has_work:
            clock.now = max(clock.now, left[0][1].time)
        while left and left[0][1].time <= clock.now:
            number, request = left.popleft()
            decoding = Decoding(max_tokens=request.output_len, seed=number)
            core.handle(
                AddRequest(
                    request_id=number, prompt_token_ids=request.tokens(), decoding=decoding,
                    arrival_time=request.time,
                )
            )  # fmt: skip
        core.step()
    return [step for step in steps if step[1]]


def seen(kv: KVCacheManager, plan: StepPlan) -> Step:
    rows = tuple((row.request_id, row.start, row.num_tokens) for row in plan.rows)
    return kv.num_referenced, rows


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [18, 100])
@pytest.mark.parametrize("seed", range(2))
def test_every_step_has_the_blocks_and_rows_of_the_engine(
    depth: int, num_blocks: int, seed: int
) -> None:
    requests = trace(random.Random(seed), 24, pace=0.03, longest=256)
    expected = real_run(limits(), num_blocks, requests, depth)
    replica = make_replica(limits(), num_blocks, max_in_flight=depth, jumps=False, exact_ends=True)
    found: list[Step] = []
    replica.on_plan = lambda plan: found.append(seen(replica.scheduler.kv, plan))
    assert len(drive(replica, requests)) == len(requests)
    assert [step for step in found if step[1]] == expected
    if num_blocks == 18:
        assert replica.scheduler.take_stats().num_preemptions


# --- jumps ----------------------------------------------------------------------------------------


def outcome(replica: Replica, log: DecisionLog, requests: list[TraceRequest]) -> object:
    lives = drive(replica, requests)
    of_steps = (DecisionKind.STEP, DecisionKind.LIMITED, DecisionKind.LATENCY)
    decisions = [replace(each, step_id=0) for each in log if each.kind not in of_steps]
    stats = replica.scheduler.take_stats()
    kv = replica.scheduler.kv
    kv.check_invariants()
    rates, costs = replica.scheduler.rates, replica.scheduler.costs
    return (
        [replace(life, turn=0) for life in lives],
        decisions,
        (stats.num_preemptions, stats.prefix_hits, stats.prefix_queries),
        [block.content and block.content.block_hash for block in kv.pool._free],
        (rates.ends_per_step, rates.ends_per_second),
        (costs.coefficients, costs.num_steps, costs.row_gain(3), costs.spread, costs.predicted),
        replica.gaps._buckets,
        replica.counts.steps,
        replica.counts.busy,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    depth=st.sampled_from([1, 2]),
    num_blocks=st.sampled_from([18, 24, 40, 400]),
    seats=st.sampled_from([1, 3, 8]),
    caching=st.booleans(),
    exact_ends=st.booleans(),
    host=st.sampled_from([0.0, 0.001, 0.02]),
    pace=st.sampled_from([0.01, 0.1, 0.5]),
    policy=st.sampled_from(["fcfs", "fair"]),
    watermark=st.sampled_from([0, 2]),
)
def test_jumps_change_nothing(
    seed: int, depth: int, num_blocks: int, seats: int, caching: bool, exact_ends: bool, host: float,
    pace: float, policy: str, watermark: int,
) -> None:  # fmt: skip
    requests = trace(random.Random(seed), 25, pace=pace, longest=256)
    rules = limits(max_num_seqs=seats, policy=policy, watermark_blocks=watermark)
    found = []
    for jumps in (False, True):
        log = DecisionLog()
        replica = make_replica(
            rules, num_blocks, caching=caching, observe=log, max_in_flight=depth, jumps=jumps,
            exact_ends=exact_ends, host_seconds=host,
        )  # fmt: skip
        found.append(outcome(replica, log, requests))
        assert jumps or not replica.counts.jumped
    assert found[0] == found[1]


def test_most_steps_of_long_answers_are_jumped() -> None:
    requests = [TraceRequest(0.0, ((10 + index, 20),), 200) for index in range(8)]
    replica = make_replica(limits(), 400)
    drive(replica, requests)
    assert replica.counts.jumped > 0.9 * replica.counts.steps


def test_a_target_is_stepped() -> None:
    requests = [TraceRequest(0.0, ((10 + index, 20),), 200) for index in range(8)]
    replica = make_replica(limits(itl_target=0.01), 400)
    drive(replica, requests)
    assert not replica.counts.jumped


def test_the_host_works_while_the_device_does() -> None:
    """With two plans in flight a step takes the longer of both, with one their sum."""
    request = [TraceRequest(0.0, ((1, 4),), 100)]
    step = Linear(constant=0.010, row=0.0, context=0.0, token=0.0)

    def gap(depth: int, host: float) -> float:
        replica = make_replica(limits(), 40, step=step, max_in_flight=depth, host_seconds=host)
        drive(replica, request)
        return replica.gaps.mean

    assert gap(1, 0.004) == pytest.approx(0.014)
    assert gap(2, 0.004) == pytest.approx(0.010)
    assert gap(2, 0.012) == pytest.approx(0.012, rel=0.02)

"""When a request waits although it fits: what it would gain and lose, by measured times."""

from __future__ import annotations

import pytest

from quire.kvcache import KVCacheManager, Loaded
from quire.messages import PlannedRow, SampledRow, StepPlan, StepResult
from quire.scheduler import Decision, DecisionKind, Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.cost_model import CostModel
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request
from tests.scheduler.stores import Store


def plan_of(*num_tokens: int) -> StepPlan:
    rows = [
        PlannedRow(request_id=i, start=0, num_tokens=count, samples=1)
        for i, count in enumerate(num_tokens)
    ]
    return StepPlan(step_id=1, rows=rows)


def measured(*steps: tuple[int, float]) -> CostModel:
    costs = CostModel()
    for rows, seconds in steps:
        costs.measure(plan_of(*[1] * rows), seconds)
    return costs


def test_a_row_saves_its_share_of_what_a_step_takes_anyway() -> None:
    costs = measured(*((rows, 0.030 + 0.001 * rows) for rows in (2, 4, 8, 16) for _ in range(5)))
    assert costs.row_gain(9) == pytest.approx(0.003, rel=0.05)
    # With rows of one number, nothing is known of the slope.
    assert measured((8, 0.04), (8, 0.04)).row_gain(7) == pytest.approx(0.005)
    # Steps that take less with more rows were disturbed: no slope, and a time between the two.
    assert 0.01 / 5 < measured((2, 0.04), (8, 0.01)).row_gain(4) < 0.04 / 5


def test_a_gain_is_never_negative() -> None:
    """Where a step's time is that of its rows alone, it is a difference of equal numbers."""
    costs = measured(*((rows, 0.383 * rows) for rows in (1, 5, 9, 4) for _ in range(10)))
    assert 0.0 <= costs.row_gain(3) < 1e-9


def test_a_prompt_takes_what_its_tokens_add_to_a_step() -> None:
    """Not the step's constant part, which is spent for the rows beside it too."""
    costs = CostModel()
    assert costs.prompt_seconds(100) == 0.0, "nothing is known"
    for step in range(40):
        count = (100, 300, 50)[step % 3]
        costs.measure(plan_of(1, 1, count), 0.05 + 1e-3 * count + 1e-6 * count * count / 2)
        costs.measure(plan_of(1, 1), 0.05)
    assert costs.prompt_seconds(200) == pytest.approx(0.2 + 0.02, rel=0.05)
    assert costs.prompt_seconds(10, 5000) == pytest.approx(0.01 + 0.05, rel=0.1), "far into it"


class Engine:
    """Steps take `fixed` seconds, and `each` for a token of a prompt. Requests of up to 80 tokens, in a pool
    of 30 blocks of 4."""

    def __init__(self, *, fixed: float, each: float, store: Store | None = None) -> None:
        self.fixed, self.each, self.now = fixed, each, 0.0
        self.decisions: list[Decision] = []
        limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=80)
        kv = KVCacheManager(31, 4, enable_prefix_caching=True)
        self.scheduler = Scheduler(
            limits, kv, clock=lambda: self.now, observe=self.decisions.append, connector=store
        )
        self.scheduler.worth.least_steps = 4.0
        self.scheduled: list[set[int]] = []

    def add(self, request_id: int, size: int, max_tokens: int) -> None:
        sizes = {"max_tokens": max_tokens, "arrival_time": float(request_id)}
        self.scheduler.add_request(add_request(request_id, [request_id] * size, **sizes))

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduled.append({row.request_id for row in plan.rows})
        self.now += self.fixed + self.each * sum(r.num_tokens for r in plan.rows if r.start == 0)
        sampled = [
            SampledRow(request_id=row.request_id, token_ids=[1]) for row in plan.rows if row.samples
        ]
        self.scheduler.update(plan, StepResult(step_id=plan.step_id, sampled=sampled))
        check_invariants(self.scheduler)

    def run(self) -> None:
        for _ in range(500):
            if self.scheduler.has_work:
                self.step()
        assert not self.scheduler.has_work

    def of(self, kind: DecisionKind, reason: WaitReason | None = None) -> list[Decision]:
        return [d for d in self.decisions if d.kind is kind and d.reason in (reason, None)]


def crowded(*, fixed: float, each: float, second: int = 2, least_steps: float = 4.0) -> Engine:
    """Two requests that grow to 60 tokens each, and one that has come when 28 of 30 blocks would be used.
    second: the id of the second, and its place in the order."""
    engine = Engine(fixed=fixed, each=each)
    engine.scheduler.worth.least_steps = least_steps
    engine.add(1, 20, 40)
    engine.add(second, 20, 40)
    for _ in range(24):
        engine.step()
    engine.add(3, 22, 20)
    engine.step()
    return engine


def test_a_request_waits_if_it_would_be_preempted_before_it_pays() -> None:
    engine = crowded(fixed=0.001, each=0.1)
    (wait,) = engine.of(DecisionKind.WAITS, WaitReason.COST)
    assert wait.request_id == 3 and wait.because_of == 2
    assert 0 < wait.gain < wait.cost == pytest.approx(0.5 * 22 * 0.1, rel=0.1)
    engine.run()
    assert not engine.of(DecisionKind.PREEMPTED)


def test_it_is_admitted_if_what_it_loses_takes_little_time() -> None:
    engine = crowded(fixed=0.1, each=0.00001)
    assert engine.scheduled[-1] == {1, 2, 3}
    engine.run()
    first = engine.of(DecisionKind.PREEMPTED, WaitReason.PREEMPTED)[0]
    assert first.request_id == 3 and 0 < first.cost < 0.05


def test_nothing_is_decided_by_the_times_of_a_few_steps() -> None:
    assert 3 in crowded(fixed=0.001, each=0.1, least_steps=32.0).scheduled[-1]


def test_a_request_that_is_not_the_last_of_the_order_does_not_wait_for_that() -> None:
    assert 3 in crowded(fixed=0.001, each=0.1, second=7).scheduled[-1]


def test_what_is_loaded_costs_the_time_of_loading() -> None:
    store = Store()
    engine = Engine(fixed=0.01, each=0.01, store=store)
    engine.add(1, 20, 10)
    engine.run()
    worth = engine.scheduler.worth
    computed = worth.resume_seconds(40)
    for _ in range(60):
        worth.returned(40, 40, Loaded(20, {}, True, False))
    store.seconds_each = 0.002
    assert 0.008 < worth.resume_seconds(40) < 0.012 < computed

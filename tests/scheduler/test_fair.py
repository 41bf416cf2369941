"""The fair policy: shares, bounds, charges, priorities and what it forgets."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, StepOutputs
from quire.placement import Placement
from quire.scheduler import Decision, DecisionKind, Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.fair import FEW_ACCOUNTS, MOST_PRIORITIES, FairQueue
from quire.scheduler.invariants import check_invariants
from quire.scheduler.request import RequestStatus
from tests.scheduler.fake_executor import CheckingExecutor
from tests.scheduler.requests import add_request
from tests.scheduler.test_scheduler_properties import (
    DeeperMachine,
    OverlappedMachine,
    PipelineMachine,
)


class FairMachine(OverlappedMachine):
    policy = "fair"

    def check_plan(self, plan):
        super().check_plan(plan)
        keys = vars(self).setdefault("keys", {})
        for request in self.scheduler.requests.values():
            if request.was_admitted:
                first = keys.setdefault(request.request_id, request.sort_key)
                assert first == request.sort_key, "its place in the order moved"


class AgingMachine(DeeperMachine):
    policy = "fair"
    aging = 20.0

    def head_that_fits(self):
        return None  # the clock goes on while a step is planned, so another may be the head then


class FairPipelineMachine(PipelineMachine):
    policy = "fair"
    drafts = True


TestFair = FairMachine.TestCase
TestAging = AgingMachine.TestCase
TestFairPipeline = FairPipelineMachine.TestCase
TestFair.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAging.settings = settings(TestFair.settings, max_examples=20)
TestFairPipeline.settings = settings(TestFair.settings, max_examples=20)


class Engine:
    """A clock that counts steps."""

    def __init__(self, *, num_blocks: int = 400, executor: Any = None, **limits: Any) -> None:
        bounds: dict[str, Any] = {
            "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "policy": "fair",
        }  # fmt: skip
        self.now = 0.0
        self.checks_every = 1
        self.decisions: list[Decision] = []
        caching = limits.pop("caching", False)
        self.scheduler = Scheduler(
            SchedulerLimits(**bounds | limits),
            KVCacheManager(num_blocks, 4, enable_prefix_caching=caching),
            clock=lambda: self.now,
            observe=self.decisions.append,
        )
        self.executor = executor or MockExecutor(lambda request_id, index: 7)
        self.core = EngineCore(self.scheduler, self.executor, clock=lambda: self.now)
        self.next_id = 0
        self.charged: Counter[str] = Counter()
        self.generated: Counter[int] = Counter()
        self.tenant_of: dict[int, str] = {}

    @property
    def queue(self) -> FairQueue:
        assert isinstance(self.scheduler.waiting, FairQueue)
        return self.scheduler.waiting

    def add(
        self,
        tenant: str,
        length: int = 8,
        tokens: int = 8,
        *,
        priority: int = 0,
        weight: float = 1.0,
        prompt: list[int] | None = None,
        **fields: Any,
    ) -> int:
        self.next_id += 1
        self.tenant_of[self.next_id] = tenant
        self.core.handle(
            add_request(
                self.next_id,
                [self.next_id] * length if prompt is None else prompt,
                max_tokens=tokens,
                arrival_time=self.now,
                placement=Placement(tenant=tenant, priority=priority, weight=weight),
                **fields,
            )
        )
        return self.next_id

    def take(self, outputs: Any) -> None:
        assert isinstance(outputs, StepOutputs)
        for update in outputs.updates:
            self.generated[update.request_id] += len(update.new_token_ids)
        for tenant, stats in outputs.stats.tenants.items():
            self.charged[tenant] += stats.charged

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1.0
            self.take(self.core.step())
            if self.now % self.checks_every == 0:
                check_invariants(self.scheduler)

    def finish(self) -> None:
        for _ in range(3000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("not everybody finished")

    def abort(self, *request_ids: int) -> None:
        self.take(self.core.handle(AbortRequests(list(request_ids))))

    @property
    def admitted(self) -> list[int]:
        """In the order of their first admissions."""
        ids = [d.request_id for d in self.decisions if d.kind is DecisionKind.ADMITTED]
        return list(dict.fromkeys(i for i in ids if i is not None))

    @property
    def admitted_tenants(self) -> str:
        return "".join(self.tenant_of[request_id] for request_id in self.admitted)

    def status(self, request_id: int) -> RequestStatus:
        return self.scheduler.requests[request_id].status

    def counter(self, tenant: str, priority: int = 0) -> float:
        account = self.queue._levels[priority].accounts[tenant]
        account.settle()  # no decision depends on when that is done
        return account.counter


# --- shares -----------------------------------------------------------------------------------------


class Shares:
    """Tenants that always have requests queued. Counts what each gets, in units of the charge, and the
    largest difference over any interval in which both had a request that could be admitted."""

    def __init__(self, rng: random.Random, weights: dict[str, float], **options: Any) -> None:
        depth = options.pop("depth", 1)
        num_blocks = options.setdefault("num_blocks", 100)
        executor = CheckingExecutor(num_blocks, 4, vocab_size=9, max_in_flight=depth)
        self.engine = Engine(executor=executor, **options)
        executor.on_plan = self.on_plan
        self.engine.checks_every = 10
        self.rng, self.weights = rng, weights
        self.lengths = {tenant: rng.choice([4, 12, 30]) for tenant in weights}
        self.tokens = {tenant: rng.choice([2, 8, 20]) for tenant in weights}
        self.prompts: dict[str, list[list[int]]] = {tenant: [] for tenant in weights}
        self.paid_by_others: set[int] = set()
        self.reached: dict[int, int] = {}
        self.prompt_units: Counter[str] = Counter()
        self.most_tokens = 0
        self.last: dict[tuple[str, str], tuple[float, float] | None] = {}
        self.gap = 0.0

    def on_plan(self, plan: Any) -> None:
        requests = self.engine.scheduler.requests
        for row in plan.rows:
            request = requests[row.request_id]
            before = self.reached.get(row.request_id, row.start)
            reach = min(row.start + row.num_tokens, request.num_prompt_tokens)
            if row.request_id not in self.paid_by_others:
                tenant = request.placement.tenant
                self.prompt_units[tenant] += max(0, reach - max(before, row.start))
            self.reached[row.request_id] = max(before, reach)
        tokens = sum(r.num_tokens for r in requests.values() if r.was_admitted)
        self.most_tokens = max(self.most_tokens, tokens)

    def fill(self) -> None:
        engine, rng = self.engine, self.rng
        queued = Counter(r.placement.tenant for r in engine.scheduler.waiting if not r.was_admitted)
        for tenant, weight in self.weights.items():
            while queued[tenant] < 4:
                queued[tenant] += 1
                prompt = [rng.randrange(9) for _ in range(rng.randint(1, self.lengths[tenant]))]
                known = self.prompts[tenant]
                if known and rng.random() < 0.3:
                    prompt = [*rng.choice(known), *prompt][:30]
                known.append(prompt)
                tokens = rng.randint(1, self.tokens[tenant])
                leader = engine.add(tenant, tokens=tokens, weight=weight, prompt=prompt)
                if rng.random() < 0.1:
                    fork = engine.add(tenant, tokens=tokens, weight=weight, prompt=prompt,
                                      seed=1, fork_of=leader)  # fmt: skip
                    self.paid_by_others.add(fork)

    def service(self) -> dict[str, float]:
        units = Counter(self.prompt_units)
        for request_id, count in self.engine.generated.items():
            units[self.engine.tenant_of[request_id]] += 2 * count
        return {tenant: units[tenant] / weight for tenant, weight in self.weights.items()}

    def run(self, steps: int) -> None:
        engine, rng = self.engine, self.rng
        for _ in range(steps):
            self.fill()
            engine.step()
            if rng.random() < 0.05 and engine.scheduler.requests:
                engine.abort(rng.choice(list(engine.scheduler.requests)))
            self.compare()

    def compare(self) -> None:
        scheduler = self.engine.scheduler
        ready = {
            request.placement.tenant
            for request in scheduler.waiting
            if not request.was_admitted and scheduler.why_waits(request).reason.label == "capacity"
        }
        served = self.service()
        for one in self.weights:
            for other in self.weights:
                if one >= other:
                    continue
                lead = served[one] - served[other]
                low, high = self.last.get((one, other)) or (lead, lead)
                low, high = min(low, lead), max(high, lead)
                self.gap = max(self.gap, high - low)
                both = one in ready and other in ready
                self.last[one, other] = (low, high) if both else None

    @property
    def bound(self) -> float:
        most_prompt = 30
        return 2 * max(most_prompt, 2 * self.most_tokens) / min(self.weights.values())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 3),
    num_blocks=st.sampled_from([24, 40, 100]),
    seats=st.integers(2, 6),
    caching=st.booleans(),
    weighted=st.booleans(),
)
def test_the_gap_between_backlogged_tenants_is_bounded(
    seed, depth, num_blocks, seats, caching, weighted
) -> None:
    """With preemption, shared prefixes, forks and aborts; and what was charged is what was computed."""
    weights = {"a": 1.0, "b": 2.0 if weighted else 1.0, "c": 1.0}
    shares = Shares(
        random.Random(seed), weights, depth=depth, num_blocks=num_blocks, max_num_seqs=seats,
        caching=caching,
    )  # fmt: skip
    shares.run(120)
    assert shares.gap <= shares.bound
    shares.engine.finish()
    units = {tenant: share * weights[tenant] for tenant, share in shares.service().items()}
    assert units == pytest.approx(dict(shares.engine.charged))


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_the_bound_is_not_a_matter_of_course(policy) -> None:
    shares = Shares(random.Random(1), {"a": 1.0, "b": 1.0}, policy=policy)
    shares.lengths.update(a=30, b=4)
    shares.tokens.update(a=20, b=2)
    shares.run(600)
    assert (shares.gap <= shares.bound) == (policy == "fair")


@pytest.mark.parametrize("num_blocks", [30, 100])
def test_shares_follow_the_weights(num_blocks) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    shares = Shares(random.Random(3), weights, num_blocks=num_blocks)
    shares.run(2000)
    each = list(shares.service().values())
    assert max(each) / min(each) < 1.05


def test_a_polite_tenant_does_not_wait_for_a_flood() -> None:
    def waits(policy: str) -> list[float]:
        engine = Engine(policy=policy, max_num_seqs=8, max_num_batched_tokens=64)
        rng, steps = random.Random(5), {}
        for _ in range(300):
            engine.add("flood", rng.randint(8, 40), rng.randint(4, 16))
        for index in range(200):
            if index % 20 == 0:
                steps[engine.add("polite", 8, 4)] = engine.now
            engine.step()
        return [
            engine.scheduler.requests[i].scheduled_time - since
            if i in engine.scheduler.requests
            else next(
                d.step_id for d in engine.decisions
                if d.request_id == i and d.kind is DecisionKind.ADMITTED
            ) - since
            for i, since in steps.items()
        ]  # fmt: skip

    assert max(waits("fair")) <= 5
    assert min(waits("fcfs")[2:]) <= 0  # not yet scheduled


# --- who is next --------------------------------------------------------------------------------------


def test_one_tenant_is_served_by_arrival() -> None:
    engine = Engine(max_num_seqs=2)
    ids = [engine.add("a", length) for length in (20, 4, 30, 8)]
    engine.finish()
    assert engine.admitted == ids


def test_tenants_alternate_by_what_they_were_charged() -> None:
    engine = Engine(max_num_seqs=1)
    for _ in range(3):
        engine.add("a", 32, 1)
    for _ in range(12):
        engine.add("b", 8, 1)
    engine.finish()
    # a pays 34 for each, b 10
    assert engine.admitted_tenants == "abbbbabbbabbbbb"


def test_a_tenant_does_not_save_up_service() -> None:
    """One that comes back begins at the least counter of those that have waited."""
    engine = Engine(max_num_seqs=1)
    engine.add("b", 8, 1)
    engine.finish()
    for _ in range(40):
        engine.add("a", 8, 1)
    engine.step(20)
    for _ in range(6):
        engine.add("b", 8, 1)
    engine.step(12)
    assert engine.admitted_tenants[-12:] == "bababababa" + "ba"


def test_a_tenant_that_comes_to_an_empty_queue_begins_where_the_last_one_is() -> None:
    engine = Engine(max_num_seqs=1)
    for _ in range(10):
        engine.add("a", 8, 1)
    engine.finish()
    engine.add("b", 8, 1)
    assert engine.counter("b") == engine.counter("a") == 100


def test_a_tenant_that_comes_back_is_before_one_with_the_same_counter() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("b", 8, 1)
    for _ in range(9):
        engine.add("a", 8, 1)
    engine.step(12)
    engine.add("b", 8, 1)
    engine.step(4)
    before = engine.admitted_tenants
    assert before.rindex("b") > 0
    assert engine.counter("a") == engine.counter("b") or before.endswith(("ba", "b"))


def test_cached_tokens_are_free() -> None:
    engine = Engine(max_num_seqs=1, caching=True)
    prompt = list(range(1, 33))
    engine.add("a", tokens=1, prompt=prompt)
    engine.finish()
    engine.add("a", tokens=1, prompt=prompt)
    engine.finish()
    assert engine.charged["a"] == (32 + 2) + (1 + 2)  # the last token is computed again


def test_a_fork_pays_what_it_generates() -> None:
    engine = Engine(caching=True)
    leader = engine.add("a", 32, 4)
    engine.add("a", 32, 4, fork_of=leader, prompt=[leader] * 32)
    engine.finish()
    assert engine.charged["a"] == 32 + 2 * (4 + 4)


def test_an_abort_refunds_what_was_not_computed() -> None:
    engine = Engine(max_num_batched_tokens=16)
    request_id = engine.add("a", 40, 4)
    engine.step()
    assert engine.counter("a") == 40
    engine.abort(request_id)
    assert engine.counter("a") == 16
    assert engine.charged["a"] == 16


def test_an_abort_in_the_queue_costs_nothing() -> None:
    engine = Engine(max_num_seqs=1)
    first = engine.add("a", 8, 8)
    second = engine.add("b", 8, 8)
    engine.step()
    engine.abort(second)
    assert engine.counter("b") == 0 and engine.status(first) is RequestStatus.RUNNING
    engine.finish()
    assert engine.charged["b"] == 0


@pytest.mark.parametrize("num_blocks", [10, 11, 12, 14])
def test_tenants_that_overtake_each_other_do_not_preempt_each_other_in_turn(num_blocks) -> None:
    """There are not blocks for all four that run. They are resumed in the order of their first admission."""
    engine = Engine(num_blocks=num_blocks, max_model_len=32, watermark_blocks=0)
    for tenant in "abab":
        engine.add(tenant, 8, 16)
    engine.finish()
    order = [d.request_id for d in engine.decisions if d.kind is DecisionKind.ADMITTED]
    assert order.count(1) == 1 and len(order) > 4
    assert engine.charged == {"a": 2 * (8 + 32), "b": 2 * (8 + 32)}, "recompute is free"


def test_what_others_computed_meanwhile_is_refunded() -> None:
    """A prompt that is preempted, and found when it comes back."""
    engine = Engine(caching=True, num_blocks=20, max_num_batched_tokens=8, max_model_len=40)
    prompt = list(range(100, 132))
    engine.add("b", 8, 30)
    first = engine.add("a", tokens=1, prompt=prompt)
    engine.step(2)
    request = engine.scheduler.requests[first]
    reached = request.num_computed_tokens
    assert 0 < reached < 32
    engine.scheduler._preempt(request, request, 1)
    assert engine.counter("a") == 32
    request.num_preemptions = 1
    found = engine.queue
    found.remove(request)
    found.admitted(request, 24)
    assert engine.counter("a") == 32 - (24 - reached)
    found.add(request)


# --- priorities -----------------------------------------------------------------------------------------


def test_priorities_come_before_counters() -> None:
    engine = Engine(max_num_seqs=1, aging=0.0)
    for tenant, priority in (("a", 1), ("b", 1), ("a", 0), ("a", 0), ("b", -1)):
        engine.add(tenant, 8, 1, priority=priority)
    engine.finish()
    assert engine.admitted == [5, 3, 4, 1, 2]


def test_service_is_not_saved_up_in_a_priority_that_gets_no_turn() -> None:
    """b's requests of priority 1 wait all the time. Its first urgent ones get no more than their share."""
    engine = Engine(max_num_seqs=1, aging=0.0)
    engine.add("b", 8, 1, priority=1)
    for _ in range(40):
        engine.add("a", 8, 1)
    engine.step(20)
    for _ in range(8):
        engine.add("b", 8, 1)
    engine.step(16)
    assert 6 <= engine.admitted_tenants[-12:].count("b") <= 7


def test_a_priority_that_gets_no_turn_ages() -> None:
    """One request of each tenant per period, so what is urgent keeps its share."""
    engine = Engine(max_num_seqs=1, aging=20.0)
    late = [engine.add("b", 8, 1, priority=5) for _ in range(3)]
    for _ in range(100):
        engine.add("a", 8, 1)
        engine.step()
    places = [
        engine.admitted.index(request_id) for request_id in late if request_id in engine.admitted
    ]
    assert len(places) == 3 and 18 <= places[0] <= 30
    assert all(18 <= later - sooner <= 30 for sooner, later in pairwise(places))
    sooner = Engine(max_num_seqs=1, aging=0.0)
    sooner.add("b", 8, 1, priority=5)
    for _ in range(100):
        sooner.add("a", 8, 1)
        sooner.step()
    assert "b" not in sooner.admitted_tenants


def test_who_was_preempted_ends_although_urgent_requests_keep_coming() -> None:
    """Urgent ones that are admitted later run after it, so each preempts it at most once."""
    engine = Engine(num_blocks=14, max_num_seqs=3, max_model_len=40, aging=0.0, watermark_blocks=0)
    slow = engine.add("b", 8, 30, priority=3)
    for _ in range(200):
        if len(engine.scheduler.waiting) < 2:
            engine.add("a", 4, 20)
        engine.step()
        if slow not in engine.scheduler.requests:
            break
    else:
        raise AssertionError("it starves")
    assert engine.generated[slow] == 30
    preempted = [d for d in engine.decisions if d.kind is DecisionKind.PREEMPTED]
    assert any(d.request_id == slow for d in preempted)


def test_while_one_waits_that_was_preempted_nobody_else_is_admitted() -> None:
    engine = Engine(num_blocks=14, max_num_seqs=3, max_model_len=40, watermark_blocks=0)
    for tenant in "ab":
        engine.add(tenant, 16, 24)
    while not any(d.kind is DecisionKind.PREEMPTED for d in engine.decisions):
        engine.step()
    urgent = engine.add("c", 4, 4, priority=-5)
    head = next(iter(engine.queue))
    assert head.num_preemptions and head.request_id == 2
    engine.finish()
    order = [d.request_id for d in engine.decisions if d.kind is DecisionKind.ADMITTED]
    assert order[-2:] == [2, urgent]


# --- what is kept ---------------------------------------------------------------------------------------


def test_tenants_that_have_gone_are_forgotten() -> None:
    engine = Engine()
    for index in range(3 * FEW_ACCOUNTS):
        engine.add(f"tenant {index}", 4, 2)
        engine.step()
    engine.finish()
    assert len(engine.queue._levels[0].accounts) <= FEW_ACCOUNTS


def test_who_got_more_is_not_forgotten() -> None:
    """While others wait, a tenant that has had more does not begin anew under a crowd of names."""
    engine = Engine(max_num_seqs=2)
    engine.add("poor", 8, 1)
    rich = engine.add("rich", 60, 4)
    engine.step(6)
    assert rich not in engine.scheduler.requests
    debt = engine.counter("rich")
    queue = engine.queue
    engine.add("blocker", 8, 40)
    engine.add("blocker", 8, 40)
    engine.step(2)
    engine.add("poor", 8, 1)
    level = queue._levels[0]
    for index in range(2 * FEW_ACCOUNTS):
        engine.abort(engine.add(f"tenant {index}", 4, 2))
    engine.now += 10
    engine.step()
    level._sweep()
    assert len(level.accounts) < 10
    if debt > level._reached:
        assert engine.counter("rich") == debt


def test_priorities_that_have_gone_are_forgotten() -> None:
    engine = Engine()
    for priority in range(3 * MOST_PRIORITIES):
        engine.add("a", 4, 1, priority=priority)
        engine.finish()
    assert len(engine.queue._levels) <= MOST_PRIORITIES


def test_a_weight_that_changes_holds_from_then_on() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("a", 8, 1)
    engine.finish()
    assert engine.counter("a") == 10
    engine.add("a", 8, 1, weight=2.0)
    engine.finish()
    assert engine.counter("a") == 15 and engine.charged["a"] == 20


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none(weight) -> None:
    engine = Engine()
    engine.core.handle(add_request(1, [1], max_tokens=1, placement=Placement(weight=weight)))
    assert not engine.scheduler.requests


# --- reports --------------------------------------------------------------------------------------------


def test_decisions_name_the_tenant_and_its_counter() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("a", 8, 4)
    engine.add("b", 8, 4)
    engine.step(2)
    admitted = next(d for d in engine.decisions if d.kind is DecisionKind.ADMITTED)
    assert (admitted.tenant, admitted.counter) == ("a", 8)
    stopped = [d for d in engine.decisions if d.reason is WaitReason.SEAT][-1]
    assert (stopped.request_id, stopped.tenant, stopped.counter) == (2, "b", 0)


def test_observing_does_not_change_decisions() -> None:
    """Counters are the same however often they are looked at."""

    def admitted(looks: bool) -> list[int]:
        rng = random.Random(7)
        engine = Engine(max_num_seqs=3)
        for _ in range(60):
            engine.add(rng.choice("abc"), rng.randint(1, 30), rng.randint(1, 9), weight=3.0)
        while engine.core.has_work:
            engine.step()
            if looks:
                for tenant in "abc":
                    engine.counter(tenant)
        return engine.admitted

    assert admitted(True) == admitted(False)


def test_the_state_of_tenants_is_reported_once_a_second_and_at_the_end() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("a", 8, 2)
    engine.add("b", 8, 2)
    reports = []
    while engine.core.has_work:
        engine.now += 0.25
        reports.append(engine.core.step().stats.tenants)
    first, *_, last = [report for report in reports if report]
    assert (first["a"].running, first["b"].waiting, first["a"].charged) == (1, 1, 10)
    assert not last["a"].running and not last["b"].running and not last["b"].waiting
    charged = Counter()
    for report in reports:
        for tenant, stats in report.items():
            charged[tenant] += stats.charged
    assert charged == {"a": 12, "b": 12}
    assert sum(map(bool, reports)) < len(reports)
    engine.step()
    assert not engine.core.step().stats.tenants

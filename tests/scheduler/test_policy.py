"""A policy whose keys move while requests wait and run: fair, and nobody is preempted back and forth."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.placement import Placement
from quire.scheduler import POLICIES, Request, Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request
from tests.scheduler.test_scheduler_properties import OverlappedMachine


class LeastServed:
    """The tenant that was served least goes first."""

    moves = True

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()

    def waiting_key(self, request: Request) -> tuple[float, ...]:
        return (self.tokens[request.placement.tenant], request.arrival_time, request.request_id)

    def served(self, request: Request, num_tokens: int) -> None:
        self.tokens[request.placement.tenant] += num_tokens


@pytest.fixture(autouse=True)
def least_served():
    POLICIES["least-served"] = LeastServed
    yield
    del POLICIES["least-served"]


class FairMachine(OverlappedMachine):
    policy = "least-served"

    def step_once(self):
        self.scheduler.waiting.sort(self.scheduler.policy.waiting_key)  # so that the head is known
        super().step_once()

    def check_plan(self, plan):
        super().check_plan(plan)
        keys = vars(self).setdefault("keys", {})
        for request in self.scheduler.requests.values():
            if request.was_admitted:
                first = keys.setdefault(request.request_id, request.sort_key)
                assert first == request.sort_key, "its place in the order moved"


TestFair = FairMachine.TestCase
TestFair.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def run(policy: str, tenants: list[int], *, num_blocks: int = 400, length: int = 8) -> list[int]:
    """Requests of 8 tokens that generate 16, all at once. Returns who is admitted, in order, again after a
    preemption."""
    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=32, policy=policy
    )
    scheduler = Scheduler(limits, KVCacheManager(num_blocks, 4, enable_prefix_caching=False))
    executor = MockExecutor(lambda request_id, index: 7)
    core = EngineCore(scheduler, executor)
    for request_id, tenant in enumerate(tenants):
        core.handle(
            add_request(
                request_id,
                [request_id] * length,
                max_tokens=16,
                arrival_time=float(request_id),
                placement=Placement(tenant=str(tenant)),
            )
        )
    for _ in range(1000):
        if not core.has_work:
            break
        core.step()
        check_invariants(scheduler)
    assert not core.has_work, "not everybody finished"
    return [message.request_id for plan in executor.plans for message in plan.admitted]


def test_a_flood_does_not_hold_back_another_tenant() -> None:
    flood = [0] * 20 + [1] * 2
    assert run("fcfs", flood) == list(range(22))
    order = run("least-served", flood)
    assert sorted(order) == list(range(22))
    assert order.index(20) < 8 and order.index(21) < 8


@pytest.mark.parametrize("num_blocks", [10, 11, 12, 14])
def test_tenants_that_overtake_each_other_do_not_preempt_each_other_in_turn(num_blocks) -> None:
    """There are not blocks for all four that run. They are resumed in the order of their first admission."""
    order = run("least-served", [0, 1, 0, 1], num_blocks=num_blocks)
    assert order.count(0) == 1 and len(order) > 4
    assert order == run("fcfs", [0, 1, 0, 1], num_blocks=num_blocks)

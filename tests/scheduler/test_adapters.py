"""Places for adapters among the running requests: how many, in which order, and that none starves."""

from __future__ import annotations

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests
from quire.placement import Placement
from quire.scheduler import Scheduler, SchedulerLimits, Wait, WaitReason
from quire.scheduler.adapters import PATIENCE
from tests.scheduler.requests import add_request

LONG = 4 * PATIENCE


class Engine:
    """Requests go to the scheduler directly, as if their adapters were in memory."""

    def __init__(
        self, most: int = 2, num_blocks: int = 4000, max_num_seqs: int = 32, **limits
    ) -> None:
        self.scheduler = Scheduler(
            SchedulerLimits(max_num_seqs, 256, 400, max_adapters=most, **limits),
            KVCacheManager(num_blocks, 4, enable_prefix_caching=True),
        )
        self.core = EngineCore(self.scheduler, MockExecutor(lambda request_id, index: 7))
        self.num = 0

    def add(self, adapter: str | None, max_tokens: int = LONG, **fields) -> int:
        self.num += 1
        place = Placement(adapter=adapter, priority=fields.pop("priority", 0))
        fields = {"arrival_time": float(self.num), **fields}
        message = add_request(
            self.num, [self.num] * 3, max_tokens=max_tokens, placement=place, **fields
        )
        self.scheduler.add_request(message)
        return self.num

    def step(self, count: int = 1) -> list[int]:
        """The ids of the running requests after it."""
        for _ in range(count):
            self.core.step()
            adapters = {request.placement.adapter for request in self.scheduler.running} - {None}
            assert adapters == set(self.scheduler.adapters.in_use)
            assert len(adapters) <= self.scheduler.limits.max_adapters
        return [request.request_id for request in self.scheduler.running]

    def why(self, request_id: int) -> Wait:
        return self.scheduler.why_waits(self.scheduler.requests[request_id])


def test_places_go_in_order_and_those_with_an_adapter_in_use_need_none() -> None:
    engine = Engine(most=2)
    ids = [engine.add(adapter) for adapter in ("a", "b", "c", "a", "d", None, "b")]
    assert engine.step() == [ids[0], ids[1], ids[3], ids[5], ids[6]]
    assert engine.why(ids[2]) == engine.why(ids[4]) == Wait(WaitReason.PLACE)
    engine.core.handle(AbortRequests([ids[0], ids[3]]))
    assert ids[2] in engine.step() and ids[4] in engine.scheduler.requests
    assert engine.why(ids[4]) == Wait(WaitReason.PLACE)
    assert engine.core.step().stats.waiting_by_reason == {"capacity": 0, "deferred": 1}


def test_a_priority_decides_who_gets_a_place() -> None:
    engine = Engine(most=1, policy="priority")
    low, high = engine.add("a", priority=1), engine.add("b", priority=0)
    assert engine.step() == [high] and engine.why(low).reason is WaitReason.PLACE


def test_an_adapter_that_is_always_in_use_does_not_starve_another() -> None:
    engine = Engine(most=1)
    engine.add("hot", 10)
    engine.step()
    cold, passed, held = engine.add("cold", 10), 0, set()
    for _ in range(10 * PATIENCE):
        late = engine.add("hot", 10)
        running = engine.step()
        if cold in running:
            break
        if late in running:
            passed += 1
        else:
            held.add(late)
            assert engine.why(late) == Wait(WaitReason.PLACE, cold)
    else:
        raise AssertionError("it starved")
    assert passed == PATIENCE, "others pass, for so many steps"
    assert 8 <= len(held) <= 10, "then the running ones come to an end"
    assert not held & set(running) and engine.scheduler.adapters.in_use == {"cold": 1}


def test_requests_without_an_adapter_are_never_held() -> None:
    engine = Engine(most=1)
    engine.add("hot")
    cold = engine.add("cold")
    engine.step(PATIENCE + 2)
    late, base = engine.add("hot"), engine.add(None)
    assert base in engine.step()
    assert engine.why(late) == Wait(WaitReason.PLACE, cold)
    engine.core.handle(AbortRequests([cold]))
    assert late in engine.step(), "nobody waits for a place any more"


def test_waiting_is_counted_for_each_request() -> None:
    engine = Engine(most=1, policy="priority")
    engine.add("hot", priority=-1)
    old = engine.add("old", priority=1)
    engine.step(PATIENCE)
    new = engine.add("new", priority=0)
    engine.step(1)
    late = engine.add("hot", priority=2)
    engine.step(1)
    assert engine.why(late) == Wait(WaitReason.PLACE, old), "not new, which came a step ago"
    assert engine.why(new) == Wait(WaitReason.PLACE)


def test_counts_of_waiting_end_with_the_waiting() -> None:
    engine = Engine(most=1)
    first, second, third = engine.add("a"), engine.add("b"), engine.add("c")
    engine.step(3)
    assert engine.scheduler.adapters._lacking == {second: 1, third: 1}
    engine.core.handle(AbortRequests([third]))
    engine.step()
    assert engine.scheduler.adapters._lacking == {second: 1}
    engine.core.handle(AbortRequests([first]))
    assert engine.step() == [second] and engine.scheduler.adapters._lacking == {}


def test_a_preempted_request_gives_up_its_place_and_comes_back() -> None:
    engine = Engine(most=2, num_blocks=101, max_num_seqs=4)
    first, second = engine.add("a", 360), engine.add("b", 360)
    for _ in range(1000):
        engine.step()
        if not engine.core.has_work:
            break
    assert not engine.scheduler.requests and not engine.scheduler.adapters.in_use
    assert (first, second) == (1, 2)


def test_keys_of_versions_share_no_blocks() -> None:
    engine, hits = Engine(most=4), []
    for adapter in ("a@1", "a@2", None, "a@1"):
        engine.num += 1
        engine.scheduler.add_request(
            add_request(
                engine.num, list(range(40)), max_tokens=1, arrival_time=float(engine.num),
                placement=Placement(adapter=adapter),
            )
        )  # fmt: skip
        hits.append(engine.core.step().stats.prefix_hits)
    assert hits == [0, 0, 0, 39], "the last one finds its own version's"

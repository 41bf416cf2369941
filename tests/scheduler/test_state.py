"""What operators see of a scheduler is what it knows, and looking changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import Answer, Control, CoreOutput, Inspect
from quire.messages.state import CoreState, RequestState
from quire.placement import Placement
from quire.scheduler import Scheduler, SchedulerLimits, WaitReason, state
from tests.scheduler.requests import add_request


def make(*, max_num_seqs: int = 2, budget: int = 16, **limits: Any) -> EngineCore:
    bounds: dict[str, Any] = {"max_model_len": 64, **limits}
    scheduler = Scheduler(
        SchedulerLimits(max_num_seqs, budget, **bounds),
        KVCacheManager(60, 4, enable_prefix_caching=True),
        clock=lambda: 9.0,
    )
    return EngineCore(scheduler, MockExecutor(lambda request_id, index: 7), clock=lambda: 10.0)


def add(core: EngineCore, request_id: int, length: int, **fields: Any) -> None:
    fields = {"max_tokens": 8, "arrival_time": float(request_id), **fields}
    core.handle(add_request(request_id, [request_id] * length, **fields))


def look(core: EngineCore) -> CoreState:
    """As the front end gets it."""
    answer = core.handle(Control(4, Inspect()))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=CoreOutput)
    assert isinstance(decoded, Answer) and decoded.id == 4 and decoded.failure is None
    [found] = decoded.states
    return found


def by_id(shown: CoreState) -> dict[int, RequestState]:
    return {request.request_id: request for request in shown.requests}


def test_running_and_waiting_requests_are_shown_as_they_are() -> None:
    core = make()
    for request_id, length in ((1, 20), (2, 5), (3, 6), (4, 7)):
        add(core, request_id, length)
    assert {r.wait.reason for r in look(core).requests if r.wait} == {WaitReason.ARRIVED.value}
    core.step()
    core.step()
    shown = look(core)
    requests = by_id(shown)
    assert list(requests) == [1, 2, 3, 4]
    assert (shown.num_running, shown.num_waiting) == (2, 2)
    assert [r.status for r in shown.requests] == ["running", "running", "waiting", "waiting"]
    first = requests[1]
    assert (first.prompt_tokens, first.computed_tokens, first.output_tokens) == (20, 20, 1)
    assert (first.max_tokens, first.blocks, first.wait) == (8, 5, None)
    assert (first.seconds, first.queued_seconds) == (1.0, 0.0)
    head, behind = requests[3].wait, requests[4].wait
    assert head is not None and (head.reason, head.label) == (WaitReason.SEAT.value, "capacity")
    assert behind is not None and behind.because_of == 3
    assert behind.reason == WaitReason.BEHIND.value
    assert shown.blocks.num_free == core.scheduler.kv.num_free and shown.cost_seconds > 0


def test_what_blocks_are_lacking_is_shown() -> None:
    core = make(max_num_seqs=8, budget=64)
    for request_id in range(1, 8):
        add(core, request_id, 50)
    for _ in range(4):
        core.step()
    waits = [request.wait for request in look(core).requests if request.wait is not None]
    assert waits[0].reason == WaitReason.BLOCKS.value
    assert waits[0].needed > waits[0].free


def test_names_and_no_text() -> None:
    core = make()
    placement = Placement(tenant="research", priority=3, cache_salt="secret-salt")
    add(core, 1, 9, placement=placement)
    core.step()
    [request] = look(core).requests
    assert (request.tenant, request.priority, request.adapter) == ("research", 3, None)
    assert b"secret-salt" not in msgspec.json.encode(look(core))


def test_a_long_queue_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MOST_WAITING", 3)
    monkeypatch.setattr(state, "MOST_RUNNING", 1)
    core = make()
    for request_id in range(1, 10):
        add(core, request_id, 5)
    core.step()
    shown = look(core)
    assert (shown.num_running, shown.num_waiting) == (2, 7)
    assert list(by_id(shown)) == [1, 3, 4, 5]


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_looking_changes_no_decision(policy: str) -> None:
    def tokens(looks: bool) -> list[list[tuple[int, int]]]:
        core = make(policy=policy, budget=12)
        for request_id in range(1, 12):
            add(core, request_id, 4 * request_id, placement=Placement(tenant=f"t{request_id % 3}"))
        steps = []
        while core.has_work:
            if looks:
                look(core)
            core.step()
            steps.append([(r.request_id, r.num_tokens) for r in core.executor.plans[-1].rows])
        return steps

    assert tokens(looks=True) == tokens(looks=False)


def test_the_fair_policys_counters_are_shown() -> None:
    core = make(policy="fair", budget=64)
    add(core, 1, 9, placement=Placement(tenant="a"))
    add(core, 2, 5, placement=Placement(tenant="b", weight=2.0))
    core.step()
    core.step()
    assert look(core).standings == {"a": 9 + 2 * 2, "b": (5 + 2 * 2) / 2}


def test_requests_on_their_way_to_the_scheduler_are_shown() -> None:
    message = add_request(3, [1, 2, 3], arrival_time=7.0, max_tokens=4)
    shown = state.preparing(message, WaitReason.GRAMMAR, 9.5)
    assert (shown.status, shown.seconds, shown.prompt_tokens) == ("preparing", 2.5, 3)
    assert shown.wait is not None and shown.wait.label == "deferred"

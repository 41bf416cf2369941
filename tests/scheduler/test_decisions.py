"""Which decision is reported when, and what a log of them keeps."""

from __future__ import annotations

from typing import Any

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, FinishReason
from quire.prefix_report import MissReason
from quire.scheduler import (
    Decision,
    DecisionKind,
    DecisionLog,
    Scheduler,
    SchedulerLimits,
    Wait,
    WaitReason,
)
from quire.scheduler.decisions import debug_log
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request


class Engine:
    def __init__(
        self, *, num_blocks: int = 40, max_num_seqs: int = 4, budget: int = 32, **limits: object
    ) -> None:
        self.decisions: list[Decision] = []
        bounds = {"max_model_len": 32, "watermark_blocks": 0, **limits}
        self.scheduler = Scheduler(
            SchedulerLimits(max_num_seqs, budget, **bounds),
            KVCacheManager(num_blocks, 4, enable_prefix_caching=True),
            clock=lambda: 0.0,
            observe=self.decisions.append,
        )
        executor = MockExecutor(lambda request_id, index: 7)
        self.core = EngineCore(self.scheduler, executor, clock=lambda: 0.0)

    def add(self, request_id: int, length: int, *, first: int | None = None, **fields: Any) -> None:
        prompt = [request_id if first is None else first] * length
        fields = {"max_tokens": 4, "arrival_time": float(request_id), **fields}
        self.core.handle(add_request(request_id, prompt, **fields))

    def step(self, count: int = 1) -> None:
        """Keeps the decisions of the last one."""
        for _ in range(count):
            self.decisions.clear()
            self.core.step()
            check_invariants(self.scheduler)

    def of(self, kind: DecisionKind) -> list[Decision]:
        return [decision for decision in self.decisions if decision.kind is kind]

    def why(self, request_id: int) -> Wait:
        return self.scheduler.why_waits(self.scheduler.requests[request_id])


def test_a_step_an_admission_and_an_end() -> None:
    engine = Engine()
    engine.add(1, 10, max_tokens=1)
    assert engine.decisions == [Decision(0, 1, DecisionKind.WAITS, WaitReason.ARRIVED)]
    engine.step()
    assert engine.decisions == [
        Decision(1, None, DecisionKind.STEP, needed=8, free=39, budget=32),
        Decision(1, 1, DecisionKind.ADMITTED, MissReason.UNSEEN, needed=10, free=36, budget=10),
        Decision(1, 1, DecisionKind.FINISHED, FinishReason.LENGTH),
    ]


def test_what_the_head_lacks_and_who_stands_behind_it() -> None:
    engine = Engine(max_num_seqs=2)
    for request_id in (1, 2, 3, 4):
        engine.add(request_id, 4)
    engine.step()
    assert engine.why(3) == Wait(WaitReason.SEAT, budget=32 - 8)
    assert engine.why(4) == Wait(WaitReason.BEHIND, 3)
    assert [d.request_id for d in engine.of(DecisionKind.WAITS)] == [3], "4 follows from 3"

    engine = Engine(num_blocks=9)
    engine.add(1, 20)
    engine.add(2, 16)
    engine.add(3, 1)
    engine.step()
    assert engine.why(2) == Wait(WaitReason.BLOCKS, needed=4, free=3, budget=12)
    assert engine.why(3) == Wait(WaitReason.BEHIND, 2)
    engine.add(4, 1)
    assert engine.why(4) == Wait(WaitReason.ARRIVED)

    engine = Engine(budget=8)
    engine.add(1, 8)
    engine.add(2, 8)
    engine.step()
    assert engine.why(2) == Wait(WaitReason.BUDGET, needed=1)

    engine = Engine(enable_chunked_prefill=False)
    engine.add(1, 20)
    engine.add(2, 13)
    engine.step()
    assert engine.why(2) == Wait(WaitReason.BUDGET, needed=13, budget=12)


def test_who_waits_by_choice_says_for_whom() -> None:
    engine = Engine(budget=8)
    engine.add(1, 20)
    engine.add(2, 20, first=1)
    engine.add(3, 20, first=1, fork_of=1)
    engine.step()
    assert engine.why(2) == Wait(WaitReason.BUDGET, needed=1)
    engine.step()
    assert engine.why(2) == Wait(WaitReason.PREFIX, 1)
    assert engine.why(3) == Wait(WaitReason.FORK, 1)
    stats = engine.scheduler.take_stats()
    assert stats.waiting_by_reason == {"capacity": 0, "deferred": 2}
    engine.core.handle(AbortRequests([2]))
    assert engine.scheduler.take_stats().waiting_by_reason == {"capacity": 0, "deferred": 1}


def test_a_victim_says_for_whom_and_a_row_that_is_cut_by_how_much() -> None:
    engine = Engine(num_blocks=9)
    engine.add(1, 15)
    engine.add(2, 15)
    engine.step(2)
    assert engine.of(DecisionKind.PREEMPTED) == []
    engine.step()
    assert engine.of(DecisionKind.PREEMPTED) == [
        Decision(3, 2, DecisionKind.PREEMPTED, WaitReason.PREEMPTED, 1, needed=1)
    ]
    assert engine.why(2) == Wait(WaitReason.PREEMPTED, 1, needed=1)

    engine = Engine(budget=16, max_num_seqs=2, max_model_len=64)
    engine.add(1, 50)
    engine.step()
    assert engine.of(DecisionKind.LIMITED) == []
    engine.step()
    assert engine.of(DecisionKind.LIMITED) == [
        Decision(2, 1, DecisionKind.LIMITED, needed=34, budget=16)
    ]


def test_a_pending_token_is_waited_for() -> None:
    engine = Engine()
    scheduler = Scheduler(
        engine.scheduler.limits,
        engine.scheduler.kv,
        needs_token_before_next=lambda message: True,
        observe=engine.decisions.append,
    )
    engine.scheduler = scheduler
    engine.core = EngineCore(
        scheduler, MockExecutor(lambda request_id, index: 7, max_in_flight=2), clock=lambda: 0.0
    )
    engine.add(1, 4)
    scheduler.schedule()
    engine.decisions.clear()
    scheduler.schedule()
    assert engine.of(DecisionKind.WAITS) == [Decision(2, 1, DecisionKind.WAITS, WaitReason.TOKEN)]


def test_the_labels_of_the_metrics() -> None:
    deferred = {reason for reason in WaitReason if reason.label == "deferred"}
    assert deferred == {
        WaitReason.PREFIX, WaitReason.FORK, WaitReason.TOKEN, WaitReason.LOAD, WaitReason.GRAMMAR,
        WaitReason.ADAPTER, WaitReason.PLACE,
    }  # fmt: skip
    assert {reason.label for reason in WaitReason} == {"capacity", "deferred"}


def test_a_log_keeps_changes_and_is_bounded() -> None:
    log = DecisionLog(most=5)
    blocks = [
        Decision(step, 1, DecisionKind.WAITS, WaitReason.BLOCKS, free=step) for step in (1, 2, 3)
    ]
    seat = Decision(4, 1, DecisionKind.WAITS, WaitReason.SEAT)
    victim = Decision(5, 2, DecisionKind.PREEMPTED, WaitReason.PREEMPTED, because_of=1)
    for decision in [*blocks, seat, victim, blocks[0]]:
        log(decision)
    assert list(log) == [blocks[0], seat, victim, blocks[0]]
    assert log.of(1) == [blocks[0], seat, victim, blocks[0]] and log.of(2) == [victim]
    for step in range(9):
        log(Decision(step, None, DecisionKind.STEP))
    assert [decision.step_id for decision in log] == [4, 5, 6, 7, 8]


def test_the_debug_log_says_once_what_each_waits_for(caplog) -> None:
    caplog.set_level("INFO", "quire.scheduler")
    assert debug_log() is None
    caplog.set_level("DEBUG", "quire.scheduler")
    log = debug_log()
    for step in (3, 4):
        log(Decision(step, None, DecisionKind.STEP, free=9))
        log(Decision(step, 2, DecisionKind.WAITS, WaitReason.COST, 1, free=9, gain=0.25, cost=1.5))
    log(Decision(5, 1, DecisionKind.FINISHED, FinishReason.STOP))
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: request 2 waits: it would be preempted too soon, because_of 1, free 9, gain 0.25, cost 1.5",
        "step 5: request 1 finished: stop",
    ]

"""The core's paragraph with no model beneath it: plan, execute, learn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import cast

import pytest

from quire.engine.core import EngineCore
from quire.engine.core_process import QUIET_MS, _Link, _serve
from quire.errors import MemoryFitError
from quire.executor.mock import MockExecutor, ScriptedFuture
from quire.kvcache import KVCacheManager
from quire.messages import (
    AbortRequests,
    AddRequest,
    Answer,
    Control,
    CoreInput,
    CoreOutput,
    Failure,
    FinishReason,
    Ping,
    Pong,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    StepOutputs,
    StepPlan,
    WakeUp,
)
from quire.scheduler import Scheduler, SchedulerLimits
from tests.scheduler.requests import add_request


def make_core(max_in_flight: int = 1) -> tuple[EngineCore, MockExecutor]:
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32)
    executor = MockExecutor(
        lambda request_id, index: 100 * request_id + index, max_in_flight=max_in_flight
    )
    scheduler = Scheduler(limits, KVCacheManager(20, 4, enable_prefix_caching=True))
    return EngineCore(scheduler, executor, clock=lambda: 5.0), executor


def add(request_id: int, prompt: list[int], max_tokens: int = 2) -> AddRequest:
    return add_request(request_id, prompt, max_tokens=max_tokens)


def test_steps_carry_a_request_from_chunks_to_its_end() -> None:
    core, executor = make_core()
    assert core.handle(add(1, list(range(10)))) is None
    steps = [core.step() for _ in range(3)]
    assert [[row.num_tokens for row in plan.rows] for plan in executor.plans] == [[8], [2], [1]]
    assert [[u.new_token_ids for u in step.updates] for step in steps] == [[], [[110]], [[111]]]
    assert steps[-1].updates[0].finish_reason is FinishReason.LENGTH
    assert all(step.stats is not None and step.timestamp == 5.0 for step in steps)
    assert core.has_work, "the executor has not heard of the end yet"
    core.step()
    assert executor.plans[-1].released == [1] and not core.has_work


def test_messages_between_steps() -> None:
    core, _ = make_core()
    core.handle(add(1, [1, 2]))
    refused = core.handle(add(1, [1, 2]))
    assert isinstance(refused, StepOutputs)
    assert refused.updates[0].finish_reason is FinishReason.ERROR
    aborted = core.handle(AbortRequests([1, 99]))
    assert isinstance(aborted, StepOutputs)
    assert [u.finish_reason for u in aborted.updates] == [FinishReason.ABORT]
    assert core.handle(Ping(3)) == Pong(3, 5.0)
    assert not core.has_work


def launched_and_taken(core: EngineCore, executor: MockExecutor) -> str:
    """What happens as a request of three tokens runs to its end: L and T with the step's number."""
    core.handle(add(1, [1, 2], max_tokens=3))
    tokens = []
    for _ in range(6):
        if core.has_work:
            tokens += [token for update in core.step().updates for token in update.new_token_ids]
    assert tokens == [102, 103, 104]
    return " ".join(f"{event[0].upper()}{step_id}" for event, step_id in executor.events)


def test_a_plan_is_done_before_the_next_is_made() -> None:
    assert launched_and_taken(*make_core()) == "L1 T1 L2 T2 L3 T3 L4 T4"


def test_with_overlap_a_plan_is_launched_before_the_last_result_is_asked_for() -> None:
    assert launched_and_taken(*make_core(max_in_flight=2)) == "L1 L2 T1 L3 T2 T3 L5 T5"


@pytest.mark.parametrize("stages", [3, 4])
def test_a_pipeline_is_filled_before_a_result_is_asked_for(stages: int) -> None:
    """The prompts are one plan; then each request has its own."""
    limits = SchedulerLimits(
        max_num_seqs=8, max_num_batched_tokens=8, max_model_len=32, stages=stages
    )
    executor = MockExecutor(lambda request_id, index: index, max_in_flight=stages)
    scheduler = Scheduler(limits, KVCacheManager(20, 4, enable_prefix_caching=True))
    core = EngineCore(scheduler, executor)
    for request_id in range(stages):
        core.handle(add(request_id, [request_id], max_tokens=4))
    while core.has_work:
        core.step()
    assert [len(plan.rows) for plan in executor.plans[: 1 + stages]] == [stages] + [1] * stages
    events = "".join(event[0] for event, _ in executor.events)
    assert events.startswith("lt" + "l" * stages + "tl" * stages + "tl" * stages + "t" * stages)


def test_messages_with_a_plan_in_flight() -> None:
    core, executor = make_core(max_in_flight=2)
    core.handle(add(1, [1, 2], max_tokens=9))
    assert core.step().updates == [] and core.has_work
    assert core.handle(Ping(4)) == Pong(4, 5.0)
    assert core.handle(Control(7, ResetPrefixCache())) == Answer(7, 0)
    aborted = core.handle(AbortRequests([1]))
    assert isinstance(aborted, StepOutputs)
    assert [u.finish_reason for u in aborted.updates] == [FinishReason.ABORT]
    assert core.has_work, "a plan is in flight"
    assert core.step().updates == [] and core.has_work, "the executor has not heard of the end"
    assert core.step().updates == [] and not core.has_work
    assert executor.plans[-1].released == [1]


class FailingExecutor(MockExecutor):
    """Has no memory to wake up with, at first."""

    failures: tuple[Exception, ...] = ()

    def wake_up(self) -> None:
        if self.failures:
            error, *rest = self.failures
            self.failures = tuple(rest)
            raise error


def test_a_control_call_that_fails_is_answered_and_the_engine_goes_on() -> None:
    core, _ = make_core()
    core.executor = executor = FailingExecutor(lambda request_id, index: index)
    executor.failures = (MemoryFitError("Free 2 GB."), RuntimeError("secret"))
    assert core.handle(Control(1, Sleep(1))) == Answer(1, 1)
    assert core.handle(Control(2, WakeUp())) == Answer(
        2, 1, Failure("Free 2 GB.", "MemoryFitError")
    )
    failed = Failure("The engine failed on WakeUp (RuntimeError).", "EngineError")
    assert core.handle(Control(3, WakeUp())) == Answer(3, 1, failed)
    assert core.handle(Control(4, WakeUp())) == Answer(4, 0)
    core.handle(add(1, [1, 2], max_tokens=1))
    assert core.step().updates[0].new_token_ids == [2]


def test_sleep_is_refused_while_requests_run() -> None:
    core, _ = make_core(max_in_flight=2)
    core.handle(add(1, [1, 2], max_tokens=9))
    core.step()
    refused = core.handle(Control(1, Sleep(1)))
    assert isinstance(refused, Answer) and refused.sleep_level == 0
    assert refused.failure is not None and "while requests run" in refused.failure.message
    core.handle(AbortRequests([1]))
    assert core.handle(Control(2, Sleep(2))) == Answer(2, 2)
    assert not core.has_work, "what was in flight has been taken"


def test_closing_does_not_ask_for_what_is_in_flight() -> None:
    core, executor = make_core(max_in_flight=2)
    core.handle(add(1, [1, 2]))
    core.step()
    core.close()
    assert executor.events == [("launched", 1)]


@dataclass
class ScriptedLink:
    """The front end's messages, turn by turn; then it says goodbye."""

    turns: deque[list[CoreInput]]
    waits: list[int | None] = field(default_factory=list)
    sent: list[CoreOutput] = field(default_factory=list)

    def receive(self, *, wait_ms: int | None) -> list[CoreInput]:
        self.waits.append(wait_ms)
        return self.turns.popleft() if self.turns else [Shutdown()]

    def send(self, message: CoreOutput) -> None:
        self.sent.append(message)


class PreparingExecutor(MockExecutor):
    """Has three pieces to prepare, and one more whenever it has executed something."""

    pieces = 3

    def execute(self, plan: StepPlan) -> ScriptedFuture:
        self.pieces += not plan.rows
        return super().execute(plan)

    def prepare(self) -> bool:
        assert not self.events or self.events[-1][0] in ("taken", "prepared"), "work in flight"
        if not self.pieces:
            return False
        self.pieces -= 1
        self.events.append(("prepared", 0))
        return True


def test_an_idle_loop_prepares_piece_by_piece_and_then_blocks() -> None:
    core, _ = make_core()
    core.executor = executor = PreparingExecutor(lambda request_id, index: index)
    assert core.prepare()
    quiet: list[CoreInput] = []
    # A message that brings no work, then one that does: nothing is begun in a turn that has one.
    turns = [quiet, [Ping(1)], [add(1, [1, 2], max_tokens=1)], quiet, *[quiet] * 4]
    link = ScriptedLink(deque(turns))
    _serve(core, cast(_Link, link))
    events = [event for event, _ in executor.events]
    step = ["launched", "taken"]
    assert events == ["prepared"] * 2 + step * 2 + ["prepared"] * 2
    # Idle, a piece, ping, request, its second step; idle with two pieces and the answer that there are no
    # more. Only the first piece waits for a quiet time.
    assert link.waits == [QUIET_MS, 0, QUIET_MS, 0, QUIET_MS, 0, 0, None, None]
    assert isinstance(link.sent[0], Pong) and len(link.sent) == 3

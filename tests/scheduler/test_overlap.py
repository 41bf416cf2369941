"""Plans made while others are in flight: what each case costs, and that no token is wrong or too many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.messages import (
    AbortRequests,
    AddRequest,
    CoreOutput,
    FinishReason,
    RequestUpdate,
    SchedulerStats,
    StepOutputs,
    StepPlan,
)
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from tests.scheduler.fake_executor import CheckingExecutor, expected_output
from tests.scheduler.requests import add_request

PROMPT = list(range(6))


class Overlapped:
    """A core with two plans in flight over an executor that checks every slot; all it did is kept."""

    def __init__(
        self,
        *,
        num_blocks: int = 40,
        needs_token_before_next: Callable[[AddRequest], bool] = lambda message: False,
    ) -> None:
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32)
        self.scheduler = Scheduler(
            limits,
            KVCacheManager(num_blocks, 4, enable_prefix_caching=True),
            needs_token_before_next=needs_token_before_next,
        )
        self.plans: list[StepPlan] = []
        executor = CheckingExecutor(num_blocks, 4, max_in_flight=2, on_plan=self.plans.append)
        self.core = EngineCore(self.scheduler, executor)
        self.updates: dict[int, list[RequestUpdate]] = {}
        self.stats: list[SchedulerStats] = []

    def add(
        self,
        request_id: int,
        prompt: list[int] = PROMPT,
        *,
        max_tokens: int = 8,
        eos: int | None = None,
        fork_of: int | None = None,
    ) -> None:
        self.updates[request_id] = []
        self.core.handle(
            add_request(
                request_id,
                prompt,
                seed=request_id,
                max_tokens=max_tokens,
                end_token_ids=frozenset(() if eos is None else (eos,)),
                arrival_time=float(request_id),
                fork_of=fork_of,
            )
        )

    def keep(self, outputs: CoreOutput | None) -> None:
        assert isinstance(outputs, StepOutputs) and outputs.stats is not None
        self.stats.append(outputs.stats)
        for update in outputs.updates:
            self.updates[update.request_id].append(update)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.keep(self.core.step())
            check_invariants(self.scheduler)

    def run(self) -> None:
        for _ in range(60):
            if self.core.has_work:
                self.step()
        assert not self.core.has_work, "not everybody finished"
        pool = self.scheduler.kv.pool
        assert pool.num_free == pool.num_usable

    def tokens(self, request_id: int) -> list[int]:
        return [token for update in self.updates[request_id] for token in update.new_token_ids]

    def ended(self, request_id: int) -> FinishReason | None:
        return self.updates[request_id][-1].finish_reason

    def rows(self, request_id: int) -> list[tuple[int, bool]]:
        """(step, pending) of the request's rows."""
        return [
            (plan.step_id, row.pending)
            for plan in self.plans
            for row in plan.rows
            if row.request_id == request_id
        ]

    def total(self, field: str) -> int:
        return sum(getattr(stats, field) for stats in self.stats)


def test_the_next_row_is_planned_before_its_token_is_known_and_none_after_the_last() -> None:
    engine = Overlapped()
    engine.add(1, max_tokens=4)
    engine.step()
    assert engine.updates[1] == [], "the first result is not asked for before the second plan"
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 4)
    assert engine.ended(1) is FinishReason.LENGTH
    assert engine.rows(1) == [(1, False), (2, True), (3, True), (4, True)]
    assert engine.total("rows_discarded") == 0
    assert engine.total("step_tokens") == len(PROMPT) + 3


def test_an_end_of_sequence_found_late_costs_one_row_and_no_token() -> None:
    output = expected_output(PROMPT, 1, 8)
    assert output[2] not in output[:2]
    engine = Overlapped()
    engine.add(1, eos=output[2])
    engine.run()
    assert engine.tokens(1) == output[:3]
    assert engine.ended(1) is FinishReason.STOP
    assert len(engine.rows(1)) == 4
    assert engine.total("rows_discarded") == 1


def test_blocks_of_an_aborted_request_are_used_again_by_the_very_next_plan() -> None:
    engine = Overlapped(num_blocks=9)
    engine.add(1, list(range(24)), max_tokens=8)
    engine.step(2)
    held = set(engine.scheduler.kv.block_ids(1))
    engine.keep(engine.core.handle(AbortRequests([1])))
    assert engine.ended(1) is FinishReason.ABORT and len(engine.tokens(1)) == 1
    engine.add(2, list(range(50, 74)), max_tokens=8)
    engine.step()
    assert engine.plans[-1].released == [1]
    (table,) = engine.plans[-1].admitted[0].block_ids
    assert held & set(table), "the pool is too large for the test"
    assert engine.total("rows_discarded") == 1
    engine.run()
    assert len(engine.updates[1]) == 2, "something was sent after the end"
    assert engine.tokens(2) == expected_output(list(range(50, 74)), 2, 8)


def test_a_core_whose_last_request_is_aborted_drains() -> None:
    engine = Overlapped()
    engine.add(1)
    engine.step()
    engine.keep(engine.core.handle(AbortRequests([1])))
    assert engine.core.has_work
    engine.step()
    assert len(engine.plans) == 1, "a plan without rows waits for the result in flight"
    engine.step()
    assert engine.plans[-1].released == [1] and not engine.core.has_work


def test_a_preempted_request_keeps_the_token_it_was_sampling() -> None:
    engine = Overlapped(num_blocks=9)
    first, second = list(range(14)), list(range(20, 34))
    engine.add(1, first, max_tokens=10)
    engine.add(2, second, max_tokens=10)
    engine.step()
    while not engine.scheduler.waiting:
        pending = 2 in engine.scheduler.requests and engine.scheduler.requests[2].num_pending_tokens
        before = len(engine.tokens(2))
        engine.step()
    assert pending == 1 and len(engine.tokens(2)) == before + 1
    assert engine.plans[-1].released == [2]
    engine.run()
    assert engine.tokens(1) == expected_output(first, 1, 10)
    assert engine.tokens(2) == expected_output(second, 2, 10)
    assert engine.updates[2][-1].num_preemptions == 1


def test_a_request_may_end_with_a_token_sampled_while_it_was_preempted() -> None:
    first, second = list(range(14)), list(range(20, 34))
    engine = Overlapped(num_blocks=9)
    engine.add(1, first, max_tokens=10)
    engine.add(2, second, max_tokens=10, eos=expected_output(second, 2, 3)[-1])
    engine.run()
    assert engine.tokens(2) == expected_output(second, 2, 3)
    assert engine.updates[2][-1].num_preemptions == 1
    assert engine.total("rows_discarded") == 0


def test_a_block_filled_by_a_pending_token_is_found_once_the_token_is_known() -> None:
    engine = Overlapped()
    engine.add(1, max_tokens=3)  # 6 tokens and the first 2 sampled fill blocks of 4
    engine.step(3)  # the second is being computed, and not known before this step's result
    known = PROMPT + expected_output(PROMPT, 1, 2)
    assert engine.scheduler.requests[1].token_ids == known
    engine.add(2, [*known, 40])
    engine.step()
    assert [row.request_id for row in engine.plans[-1].rows] == [2], "the first has its last row"
    assert engine.plans[-1].rows[0].start == len(known), "both blocks are found"
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 3)
    assert engine.tokens(2) == expected_output([*known, 40], 2, 8)


def test_siblings_fork_off_a_prompt_in_flight() -> None:
    engine = Overlapped()
    engine.add(1)
    engine.add(2, fork_of=1)
    engine.add(3, fork_of=1)
    engine.step(2)
    assert [len(plan.admitted) for plan in engine.plans] == [1, 2]
    assert len(engine.plans[1].copies) == 2, "the prompt's second block is half full"
    assert [row.num_tokens for row in engine.plans[1].rows] == [1, 1, 1]
    engine.run()
    for request_id in (1, 2, 3):
        assert engine.tokens(request_id) == expected_output(PROMPT, request_id, 8)


def test_a_request_that_needs_its_token_first_sits_out_every_other_step() -> None:
    engine = Overlapped(needs_token_before_next=lambda message: message.request_id == 1)
    engine.add(1, max_tokens=3)
    engine.add(2, max_tokens=6)
    engine.run()
    assert engine.rows(1) == [(1, False), (3, False), (5, False)]
    assert [step for step, _ in engine.rows(2)] == [1, 2, 3, 4, 5, 6]
    assert engine.total("rows_held") == 2
    assert engine.tokens(1) == expected_output(PROMPT, 1, 3)
    assert engine.tokens(2) == expected_output(PROMPT, 2, 6)


def test_alone_it_runs_as_without_overlap() -> None:
    engine = Overlapped(needs_token_before_next=lambda message: True)
    engine.add(1, max_tokens=3)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 3)
    assert not any(pending for _, pending in engine.rows(1))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_block_that_the_last_generated_token_fills_is_found(depth: int) -> None:
    kv = KVCacheManager(20, 4, enable_prefix_caching=True)
    scheduler = Scheduler(SchedulerLimits(2, 16, 32), kv)
    executor = CheckingExecutor(20, 4, vocab_size=50, max_in_flight=depth)
    core = EngineCore(scheduler, executor)
    core.handle(add_request(1, [1, 2, 3, 4, 5], max_tokens=4, end_token_ids=frozenset()))
    tokens = [1, 2, 3, 4, 5]
    while core.has_work:
        tokens += [token for update in core.step().updates for token in update.new_token_ids]
    assert len(tokens) == 9, "8 of them were computed: two blocks"
    core.handle(add_request(2, tokens, max_tokens=1))
    [update] = core.step().updates or core.step().updates
    assert update.prefix is not None and update.prefix.device == 8

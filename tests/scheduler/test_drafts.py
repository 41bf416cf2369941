"""Rows that verify drafts: what they cost, what is kept, and that wrong guesses leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quire.decoding import TokenRules
from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.messages import (
    AddRequest,
    FinishReason,
    PlannedRow,
    RequestUpdate,
    StepOutputs,
    StepPlan,
)
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from tests.scheduler.fake_executor import CheckingExecutor, Drafter, expected_output
from tests.scheduler.requests import add_request

PROMPT = list(range(6))


def right(count: int) -> Drafter:
    return lambda tokens, seed: expected_output(list(tokens), seed, count)


def wrong(count: int) -> Drafter:
    """None is right: no token is that large."""
    return lambda tokens, seed: [1000 + index for index in range(count)]


def half_right(tokens: tuple[int, ...], seed: int) -> list[int]:
    return [*expected_output(list(tokens), seed, 2), 1000, 1001]


class Engine:
    def __init__(
        self,
        drafter: Drafter,
        *,
        num_blocks: int = 60,
        budget: int = 32,
        max_in_flight: int = 1,
        needs_token: bool = True,
        takes_drafts: Callable[[AddRequest], bool] = lambda message: True,
        **limits: int,
    ) -> None:
        drafts = {"max_drafts": 8, "adaptive_drafts": False}
        bounds = {"max_model_len": 40, "watermark_blocks": 0, **drafts, **limits}
        self.scheduler = Scheduler(
            SchedulerLimits(4, budget, **bounds),
            KVCacheManager(num_blocks, 4, enable_prefix_caching=True),
            needs_token_before_next=lambda message: needs_token,
            takes_drafts=takes_drafts,
        )
        self.plans: list[StepPlan] = []
        self.executor = CheckingExecutor(
            num_blocks, 4, max_in_flight=max_in_flight, on_plan=self.plans.append, drafter=drafter
        )
        self.core = EngineCore(self.scheduler, self.executor)
        self.updates: dict[int, list[RequestUpdate]] = {}

    def add(
        self,
        request_id: int,
        prompt: list[int] = PROMPT,
        *,
        max_tokens: int = 10,
        eos: int | None = None,
        **decoding: object,
    ) -> None:
        self.updates[request_id] = []
        message = add_request(
            request_id,
            prompt,
            max_tokens=max_tokens,
            seed=request_id,
            end_token_ids=frozenset() if eos is None else frozenset({eos}),
            arrival_time=float(request_id),
            **decoding,
        )
        assert self.core.handle(message) is None

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            outputs = self.core.step()
            assert isinstance(outputs, StepOutputs)
            check_invariants(self.scheduler)
            for update in outputs.updates:
                self.updates[update.request_id].append(update)

    def run(self) -> None:
        for _ in range(100):
            if self.core.has_work:
                self.step()
        assert not self.core.has_work, "not everybody finished"
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_usable

    def tokens(self, request_id: int) -> list[int]:
        return [token for update in self.updates[request_id] for token in update.new_token_ids]

    def rows(self, request_id: int) -> list[PlannedRow]:
        return [row for plan in self.plans for row in plan.rows if row.request_id == request_id]

    def shape(self, request_id: int) -> list[tuple[int, int, int]]:
        """Of each row: start, tokens that are no drafts, drafts."""
        return [
            (row.start, row.num_tokens - len(row.draft_token_ids), len(row.draft_token_ids))
            for row in self.rows(request_id)
        ]


def test_right_drafts_are_several_tokens_a_step() -> None:
    engine = Engine(right(3))
    engine.add(1, max_tokens=10)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 10)
    assert [len(update.new_token_ids) for update in engine.updates[1]] == [1, 4, 4, 1]
    assert engine.shape(1) == [(0, 6, 0), (6, 1, 3), (10, 1, 3), (14, 1, 0)], (
        "no more than are left"
    )
    assert [row.samples for row in engine.rows(1)] == [1, 4, 4, 1]


@pytest.mark.parametrize(
    ("decoding", "drafted"),
    [
        ({"presence_penalty": 0.5}, False),
        ({"allowed_token_ids": [1, 2], "temperature": 1.0}, True),
        ({"rules": TokenRules(bad_words=[[5]])}, True),
    ],
)
def test_a_device_may_sample_some_requests_one_token_at_a_time(
    decoding: dict[str, object], drafted: bool
) -> None:
    engine = Engine(right(3), takes_drafts=lambda message: not message.decoding.has_penalties)
    engine.add(1, max_tokens=10, **decoding)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 10)
    assert any(row.samples > 1 for row in engine.rows(1)) == drafted
    assert any(row.num_drafts > 0 for row in engine.rows(1)) == drafted


def test_wrong_drafts_cost_their_slots_for_a_step() -> None:
    engine = Engine(wrong(3))
    engine.add(1, max_tokens=6)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 6)
    assert engine.shape(1) == [
        (0, 6, 0), (6, 1, 3), (7, 1, 3), (8, 1, 2), (9, 1, 1), (10, 1, 0),
    ]  # fmt: skip
    assert engine.executor.num_accepted == 0


def test_after_the_first_wrong_one_nothing_is_kept() -> None:
    engine = Engine(half_right)
    engine.add(1, max_tokens=20)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 20)
    assert engine.shape(1)[:4] == [(0, 6, 0), (6, 1, 4), (9, 1, 4), (12, 1, 4)]


@pytest.mark.parametrize("kept", [1, 4, 5, 6])
def test_an_end_token_among_accepted_drafts_ends_the_request(kept: int) -> None:
    output = expected_output(PROMPT, 1, 10)
    assert output[kept] not in output[:kept]
    engine = Engine(right(7))
    engine.add(1, eos=output[kept])
    engine.run()
    assert engine.tokens(1) == output[: kept + 1]
    assert engine.updates[1][-1].finish_reason is FinishReason.STOP
    engine.add(2, [*PROMPT, *output[: kept + 1], 7])
    engine.step()
    computed = len(PROMPT) + kept  # the end token was no draft: nothing follows it
    assert engine.rows(2)[0].start == computed // 4 * 4, "whole blocks of what was accepted"


def test_blocks_are_shared_when_their_tokens_are_known() -> None:
    engine = Engine(wrong(5))
    engine.add(1, max_tokens=8)
    engine.step(2)
    known = PROMPT + expected_output(PROMPT, 1, 2)
    row = engine.rows(1)[-1]
    assert row.draft_token_ids == (1000, 1001, 1002, 1003, 1004)
    guess = [*known[:7], *row.draft_token_ids]
    engine.add(2, [*guess, 7], max_tokens=1)
    engine.step()
    assert engine.rows(2)[0].start == 4, "only the block that was known"
    engine.run()
    engine = Engine(right(5))
    engine.add(1, max_tokens=8)
    engine.step(2)
    engine.add(2, [*PROMPT, *expected_output(PROMPT, 1, 7), 7], max_tokens=1)
    engine.step()
    assert engine.rows(2)[0].start == 12, "whole blocks of accepted drafts"


def test_drafts_take_what_is_left_of_the_budget_in_order() -> None:
    engine = Engine(right(3), budget=16)
    for request_id in (1, 2, 3):
        engine.add(request_id, [request_id] * 2)
    engine.step()
    engine.add(4, [4] * 20)
    engine.step()
    shapes = {row.request_id: len(row.draft_token_ids) for row in engine.plans[-1].rows}
    assert engine.plans[-1].num_tokens == 16 and shapes == {1: 0, 2: 0, 3: 0, 4: 0}
    engine.step()
    shapes = {row.request_id: len(row.draft_token_ids) for row in engine.plans[-1].rows}
    assert shapes == {1: 3, 2: 3, 3: 0, 4: 0}, "the rest of the long prompt came first"
    assert engine.plans[-1].num_tokens == 16
    engine.run()


def test_drafts_take_what_is_left_of_the_samples() -> None:
    engine = Engine(right(3), max_samples=6)
    for request_id in (1, 2):
        engine.add(request_id, [request_id] * 2)
    engine.step(2)
    assert [row.samples for row in engine.plans[-1].rows] == [4, 2]
    engine.run()


def test_drafts_take_free_blocks_only_and_preempt_nobody() -> None:
    engine = Engine(right(6), num_blocks=1 + 10)
    engine.add(1, list(range(14)), max_tokens=20)
    engine.add(2, list(range(20, 34)), max_tokens=20)
    engine.step(2)
    assert engine.scheduler.kv.num_free == 0
    drafts = [len(row.draft_token_ids) for row in engine.plans[-1].rows]
    assert drafts == [6, 1], "the second has one slot left in its blocks"
    assert sum(len(plan.released) for plan in engine.plans) == 0
    engine.run()
    for request_id, prompt in ((1, list(range(14))), (2, list(range(20, 34)))):
        assert engine.tokens(request_id) == expected_output(prompt, request_id, 20)


def test_a_row_that_is_cut_has_no_drafts() -> None:
    engine = Engine(right(3), budget=8)
    engine.add(1, list(range(20)), max_tokens=6)
    engine.run()
    assert engine.shape(1) == [(0, 8, 0), (8, 8, 0), (16, 4, 0), (20, 1, 3), (24, 1, 0)]


def test_a_preempted_request_keeps_what_was_sampled_and_drops_its_drafts() -> None:
    for max_in_flight in (1, 2):
        engine = Engine(half_right, num_blocks=1 + 10, max_in_flight=max_in_flight)
        first, second = list(range(14)), list(range(20, 34))
        engine.add(1, first, max_tokens=20)
        engine.add(2, second, max_tokens=20)
        engine.run()
        assert engine.updates[2][-1].num_preemptions > 0
        assert engine.tokens(1) == expected_output(first, 1, 20)
        assert engine.tokens(2) == expected_output(second, 2, 20)
        assert engine.executor.num_accepted > 0


def test_with_overlap_a_row_with_drafts_is_waited_for() -> None:
    engine = Engine(right(3), max_in_flight=2)
    engine.add(1, max_tokens=10)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 10)
    assert [plan.step_id for plan in engine.plans if plan.rows] == [1, 3, 5, 7]
    engine = Engine(right(3), max_in_flight=2, needs_token=False)
    engine.add(1, max_tokens=10)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 10)
    assert [plan.step_id for plan in engine.plans if plan.rows] == [1, 3, 5, 7], "it is asked"
    engine = Engine(right(3), max_in_flight=2, needs_token=False, max_drafts=0)
    engine.add(1, max_tokens=10)
    engine.run()
    assert engine.tokens(1) == expected_output(PROMPT, 1, 10)
    assert [plan.step_id for plan in engine.plans if plan.rows] == list(range(1, 11))
    assert engine.executor.num_drafts == 0


def test_whoever_plans_before_the_result_gets_no_row_for_it() -> None:
    engine = Engine(right(3), needs_token=False)
    engine.add(1)
    engine.step()
    plan = engine.scheduler.schedule()
    assert plan.rows[0].draft_token_ids and not engine.scheduler.schedule().rows
    engine.scheduler.update(plan, engine.executor.execute(plan).result())
    assert engine.scheduler.schedule().rows[0].start == len(PROMPT) + 4


def test_slots_of_wrong_drafts_are_not_promised_to_others() -> None:
    """A request that holds more blocks than its tokens fill promises none of them to who waits."""
    engine = Engine(wrong(8), num_blocks=1 + 10)
    engine.add(1, list(range(14)), max_tokens=20)
    engine.step(2)
    kv = engine.scheduler.kv
    assert kv.num_blocks_of(1) > kv.blocks_for(engine.scheduler.requests[1].num_tokens)
    engine.add(2, [9] * (4 * kv.num_free + 1), max_tokens=4)
    engine.step()
    assert engine.scheduler.why_waits(engine.scheduler.requests[2]).needed == kv.num_free + 1

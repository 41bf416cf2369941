"""Steps sized by a target, on the real scheduler in simulated time: gaps beside a long prompt, short requests
beside it, and that outputs do not depend on it."""

from __future__ import annotations

import pytest

from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.messages import StepOutputs, StepPlan
from quire.scheduler import DecisionKind, Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.cost_model import Work
from tests.scheduler.fake_executor import CheckingExecutor
from tests.scheduler.requests import add_request
from tests.scheduler.timed import LONG, M2, TimedEngine, percentile

TARGET = 0.1
LONG_ID, SHORT_ID = 100, 200


def beside_a_long_prompt(
    target: float = TARGET, *, noise: float = 0.1, seed: int = 1, cost: Work = M2
) -> TimedEngine:
    """Eight requests generate; the gaps are those since the long prompt has come."""
    engine = TimedEngine(target, noise=noise, seed=seed, cost=cost)
    for request_id in range(8):
        engine.add(request_id, 100, max_tokens=3000)
    engine.run(20)
    engine.gaps.clear()
    engine.add(LONG_ID, LONG)
    return engine


@pytest.mark.parametrize("target", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("seed", [1, 2])
def test_gaps_keep_the_target_beside_a_long_prompt_and_most_of_it_is_used(
    target: float, seed: int
) -> None:
    engine = beside_a_long_prompt(target, seed=seed)
    engine.run(300)
    assert percentile(engine.gaps, 0.99) <= 1.2 * target
    assert percentile(engine.gaps, 0.5) >= 0.8 * target
    engine = beside_a_long_prompt(0.0, seed=seed)
    engine.run(5)
    assert min(engine.gaps) > 3 * target, "what it is without"


def test_the_first_step_does_not_stall_although_no_prompt_was_measured() -> None:
    engine = TimedEngine(TARGET, noise=0.0)
    engine.add(1, 1, max_tokens=3000)
    engine.run(20)
    engine.gaps.clear()
    engine.add(LONG_ID, LONG)
    engine.run(20)
    assert max(engine.gaps) <= 1.2 * TARGET
    assert engine.gaps[-1] >= 0.9 * TARGET


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    engine = beside_a_long_prompt(noise=0.02)
    engine.run(50)
    engine.cost = Work(*(2.5 * each for each in M2))
    engine.run(15)
    engine.gaps.clear()
    engine.run(50)
    assert percentile(engine.gaps, 0.9) <= 1.1 * TARGET


@pytest.mark.parametrize("after", [1, 50, 200])
@pytest.mark.parametrize("prompt", [50, 300])
def test_a_short_request_beside_a_long_prompt_has_its_first_token_within_three_steps_more(
    after: int, prompt: int
) -> None:
    engine = beside_a_long_prompt()
    engine.run(after)
    alone = TimedEngine(TARGET, noise=0.0)
    alone.add(1, 100, max_tokens=3000)
    alone.run(5)
    began = alone.step
    alone.add(SHORT_ID, prompt)
    alone.run(30)
    own = alone.first[SHORT_ID] - began
    began = engine.step
    engine.add(SHORT_ID, prompt)
    engine.run(30)
    assert engine.first[SHORT_ID] - began <= 3 + own


def test_beside_a_flood_of_shorter_prompts_that_run_the_long_one_keeps_its_quarter() -> None:
    """They have fewer tokens left, so all that is not kept for the first is theirs."""
    engine = beside_a_long_prompt(noise=0.0)
    engine.run(10)
    before = engine.scheduler.requests[LONG_ID].num_computed_tokens
    for step in range(100):
        engine.add(1000 + step, 1500, max_tokens=2)
        engine.run()
    computed = engine.scheduler.requests[LONG_ID].num_computed_tokens - before
    assert computed * (M2.prompt_tokens + 2000 * M2.prompt_contexts) >= 0.2 * 100 * 0.08


def test_beside_a_flood_of_short_prompts_the_long_one_keeps_its_quarter() -> None:
    engine = beside_a_long_prompt(noise=0.0)
    engine.run(10)
    before = engine.scheduler.requests[LONG_ID].num_computed_tokens
    for step in range(100):
        for index in range(3):
            engine.add(1000 + 3 * step + index, 100, max_tokens=2)
        engine.run()
    computed = engine.scheduler.requests[LONG_ID].num_computed_tokens - before
    assert computed * (M2.prompt_tokens + 2000 * M2.prompt_contexts) >= 0.2 * 100 * 0.08
    assert percentile(engine.gaps, 0.99) <= 1.2 * TARGET


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_a_target_that_cannot_be_kept_does_not_stop_prompts(policy: str) -> None:
    engine = TimedEngine(0.001, policy=policy, noise=0.0)
    engine.add(0, 100, max_tokens=3000)
    engine.run(5)
    engine.add(LONG_ID, 640)
    for index in range(3):
        engine.add(SHORT_ID + index, 40)
    engine.run(120)
    assert {LONG_ID, SHORT_ID, SHORT_ID + 1, SHORT_ID + 2} <= set(engine.first)
    assert max(engine.first[SHORT_ID + index] for index in range(3)) < engine.first[LONG_ID]


def test_a_long_prefix_in_the_cache_makes_new_tokens_dear() -> None:
    """A token after 30,000 that were found costs several times one at the beginning."""
    engine = beside_a_long_prompt(noise=0.0)
    document = list(range(30_000))
    engine.run(60)  # attention is measured
    engine.scheduler.abort([LONG_ID, *range(8)])
    engine.add_message(add_request(300, document, max_tokens=1))
    engine.run(20)
    for request_id in range(400, 408):
        engine.add(request_id, 100, max_tokens=3000)
    engine.run(20)
    engine.gaps.clear()
    engine.add_message(add_request(301, [*document, *[7] * 500], max_tokens=4))
    engine.run(60)
    assert 301 in engine.ended
    assert max(engine.gaps) <= 1.1 * TARGET


def test_with_nobody_generating_the_full_budget_is_used() -> None:
    engine = TimedEngine(TARGET)
    engine.add(LONG_ID, LONG)
    engine.run(3)
    assert [plan.num_tokens for plan in engine.plans] == [2048] * 3
    assert not [d for d in engine.decisions if d.kind is DecisionKind.LATENCY]


def test_a_generous_target_never_exceeds_the_budget_of_tokens() -> None:
    engine = beside_a_long_prompt(1000.0)
    engine.run(10)
    assert all(plan.num_tokens == 2048 for plan in engine.plans[-10:])


def test_the_choice_is_a_decision_with_its_numbers() -> None:
    engine = beside_a_long_prompt(noise=0.0)
    engine.run(20)
    last = [d for d in engine.decisions if d.kind is DecisionKind.LATENCY][-1]
    assert last.budget == engine.prompt_tokens() and last.needed >= 2048
    assert last.gain == TARGET
    assert last.cost == pytest.approx(engine.gaps[-1], rel=0.05)
    assert str(last).endswith(f"budget {last.budget}, gain 0.1, cost {last.cost:.4g}")


def test_who_has_to_wait_for_the_next_step_has_the_reason() -> None:
    engine = beside_a_long_prompt(0.001, noise=0.0)
    engine.add(LONG_ID + 1, 5000)
    engine.run(20)
    waits = [d for d in engine.decisions if d.reason is WaitReason.TARGET]
    assert {d.request_id for d in waits} >= {LONG_ID}


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_outputs_do_not_depend_on_the_target(max_in_flight: int) -> None:
    def run(target: float) -> dict[int, list[int]]:
        now = [0.0]

        def clock() -> float:
            now[0] += 0.001 * (1 + int(now[0] * 7919) % 5)
            return now[0]

        limits = SchedulerLimits(
            max_num_seqs=6, max_num_batched_tokens=64, max_model_len=200, itl_target=target
        )
        kv = KVCacheManager(60, 4, enable_prefix_caching=True)
        plans: list[StepPlan] = []
        executor = CheckingExecutor(60, 4, max_in_flight=max_in_flight, on_plan=plans.append)
        core = EngineCore(Scheduler(limits, kv, clock=clock), executor)
        tokens: dict[int, list[int]] = {}
        for index in range(12):
            size = (100, 7, 33)[index % 3]
            core.handle(
                add_request(
                    index,
                    [index % 2] * 8 + [index + 2] * size,
                    max_tokens=20,
                    seed=index,
                )
            )
            for _ in range(3):
                outputs = core.step()
                collect(tokens, outputs)
        for _ in range(2000):
            if not core.has_work:
                break
            collect(tokens, core.step())
        assert not core.has_work
        shapes.append([row.num_tokens for plan in plans for row in plan.rows])
        return tokens

    shapes: list[list[int]] = []
    whole, small, tiny = run(0.0), run(0.008), run(0.0001)
    assert whole == small == tiny and len(whole) == 12
    assert shapes[0] != shapes[1] != shapes[2], "the target had an effect"


def collect(tokens: dict[int, list[int]], outputs: StepOutputs) -> None:
    for update in outputs.updates:
        tokens.setdefault(update.request_id, []).extend(update.new_token_ids)

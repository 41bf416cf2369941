"""Short requests beside long prompts, on the real scheduler: when they are admitted, what that costs the long
ones, and that no token is computed twice for it."""

from __future__ import annotations

import pytest

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import CacheKey, KVCacheManager
from quire.messages import AbortRequests, StepOutputs, StepPlan
from quire.placement import Placement
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request

BUDGET = 2048
LONG = 32_000
SHORT = 50


class Engine:
    """Remembers the step in which each request arrived, was admitted, sampled first and ended."""

    def __init__(
        self,
        *,
        policy: str = "fcfs",
        num_blocks: int = 40_000,
        threshold: int = 0,
        caching: bool = True,
        max_in_flight: int = 1,
    ) -> None:
        limits = SchedulerLimits(
            max_num_seqs=128,
            max_num_batched_tokens=BUDGET,
            max_model_len=LONG + 100,
            long_prefill_token_threshold=threshold,
            policy=policy,
        )
        kv = KVCacheManager(num_blocks, 16, enable_prefix_caching=caching)
        self.scheduler = Scheduler(limits, kv)
        self.executor = MockExecutor(lambda request_id, index: 7, max_in_flight=max_in_flight)
        self.core = EngineCore(self.scheduler, self.executor)
        self.arrived: dict[int, int] = {}
        self.admitted: dict[int, int] = {}
        self.sampled: dict[int, int] = {}

    @property
    def plans(self) -> list[StepPlan]:
        return self.executor.plans

    def add(
        self, prompt: int | list[int], *, count: int = 1, max_tokens: int = 4, priority: int = 0
    ) -> list[int]:
        """prompt: token ids, or of how many that nobody else has."""
        ids = []
        for _ in range(count):
            request_id = len(self.arrived)
            tokens = prompt if isinstance(prompt, list) else [1000 + request_id] * prompt
            message = add_request(
                request_id,
                tokens,
                max_tokens=max_tokens,
                arrival_time=float(request_id),
                placement=Placement(priority=priority),
            )
            assert self.core.handle(message) is None
            self.arrived[request_id] = len(self.plans)
            ids.append(request_id)
        return ids

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            assert isinstance(self.core.step(), StepOutputs)
            check_invariants(self.scheduler)
            number = len(self.plans)
            for message in self.plans[-1].admitted:
                self.admitted.setdefault(message.request_id, number)
            for row in self.plans[-1].rows:
                if row.samples:
                    self.sampled.setdefault(row.request_id, number)

    def run(self) -> Engine:
        for _ in range(400):
            if not self.core.has_work:
                return self
            self.step()
        raise AssertionError("not everybody finished")

    def tokens_of(self, request_id: int) -> list[int]:
        """How many tokens of the request each step computed; 0 where it had no row."""
        return [
            sum(row.num_tokens for row in plan.rows if row.request_id == request_id)
            for plan in self.plans
        ]

    @property
    def num_tokens(self) -> int:
        return sum(plan.num_tokens for plan in self.plans)


def steps_for(tokens: int) -> int:
    return -(-tokens // BUDGET)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_short_request_is_admitted_and_sampled_in_the_next_step(max_in_flight: int) -> None:
    engine = Engine(max_in_flight=max_in_flight)
    (long,) = engine.add(LONG)
    engine.step(3)
    (short,) = engine.add(SHORT)
    engine.step()
    assert engine.admitted[short] == engine.sampled[short] == 4
    engine.run()
    assert engine.sampled[long] == steps_for(LONG + SHORT + 3)


def test_alone_a_long_prompt_takes_whole_steps() -> None:
    engine = Engine()
    engine.add(LONG)
    engine.run()
    full, rest = divmod(LONG, BUDGET)
    assert engine.tokens_of(0)[: full + 1] == [BUDGET] * full + [rest]


def test_a_burst_is_admitted_within_a_few_steps_and_the_long_prompt_pays_for_its_tokens_only() -> (
    None
):
    engine = Engine()
    (long,) = engine.add(LONG)
    engine.step(3)
    burst = engine.add(SHORT, count=50)
    engine.run()
    assert max(engine.sampled[short] for short in burst) <= 3 + 5
    assert engine.sampled[long] == steps_for(LONG + 50 * (SHORT + 3))
    assert all(plan.num_tokens == BUDGET for plan in engine.plans[: engine.sampled[long] - 1])


def test_each_of_several_long_prompts_advances_by_a_quantum_and_the_first_by_most() -> None:
    engine = Engine()
    first, *others = engine.add(LONG, count=4)
    engine.step(5)
    rows = {row.request_id: row.num_tokens for row in engine.plans[-1].rows}
    quantum = BUDGET // 4 // 4
    assert [rows[request_id] for request_id in others] == [quantum] * 3
    assert rows[first] == BUDGET - 3 * quantum
    (short,) = engine.add(SHORT)
    engine.step()
    assert engine.sampled[short] == 6
    engine.run()
    assert all(engine.sampled[first] < engine.sampled[request_id] for request_id in others)


def test_who_wants_little_leaves_his_share_to_the_others() -> None:
    """Thirty requests that catch up with three tokens each do not make everybody's quantum three."""
    engine = Engine()
    few = engine.add(SHORT, count=30, max_tokens=50)
    engine.step(2)
    (long,) = engine.add(LONG)
    engine.step(2)
    for request_id in few:
        engine.scheduler.requests[request_id].token_ids += [7, 7]
    (short,) = engine.add(400)
    engine.step()
    rows = {row.request_id: row.num_tokens for row in engine.plans[-1].rows}
    assert {rows[request_id] for request_id in few} == {3}
    assert rows[short] == 400 and rows[long] == BUDGET - 400 - 90


def test_an_urgent_request_leads_from_its_second_step_and_the_other_is_not_stopped() -> None:
    engine = Engine(policy="priority")
    (low,) = engine.add(LONG, priority=5)
    engine.step(3)
    (urgent,) = engine.add(LONG, priority=0)
    engine.step(2)
    assert engine.tokens_of(urgent)[3:] == [512, BUDGET - 256]
    assert engine.tokens_of(low)[3:] == [BUDGET - 512, 256]


def test_one_without_urgency_is_not_starved_by_an_urgent_prompt() -> None:
    engine = Engine(policy="priority")
    engine.add(LONG, priority=0)
    engine.step(3)
    (low,) = engine.add(SHORT, priority=5)
    engine.step()
    assert engine.sampled[low] == 4


def test_a_head_without_blocks_leaves_its_quantum_to_those_who_run() -> None:
    engine = Engine(num_blocks=1 + -(-(LONG + 100) // 16))
    (long,) = engine.add(LONG)
    engine.step(3)
    (blocked,) = engine.add(LONG)
    engine.step(3)
    assert engine.tokens_of(long)[3:] == [BUDGET] * 3
    assert blocked not in engine.admitted


def test_the_threshold_still_bounds_a_row() -> None:
    engine = Engine(threshold=512)
    long, other = engine.add(LONG, count=2)
    engine.step(2)
    assert engine.tokens_of(long) == engine.tokens_of(other) == [512, 512]


# --- prompts that begin alike ---------------------------------------------------------------------


def document(questions: int) -> list[list[int]]:
    text = list(range(LONG - 100))
    return [[*text, *([50_000 + index] * SHORT)] for index in range(questions)]


def test_what_a_running_prompt_is_computing_is_waited_for_not_computed_twice() -> None:
    engine = Engine()
    ids = [engine.add(prompt)[0] for prompt in document(10)]
    engine.step(3)
    (short,) = engine.add(SHORT)
    engine.step()
    assert engine.sampled[short] == 4, "those who wait for the document block nobody"
    assert set(engine.admitted) == {ids[0], short}
    engine.run()
    once = LONG - 100 + 10 * (SHORT + 3) + SHORT + 3
    assert once <= engine.num_tokens < once + 10 * 16
    assert {engine.admitted[request_id] for request_id in ids[1:]} == {engine.sampled[ids[0]] + 1}


def test_nor_is_what_one_admitted_in_the_same_step_is_computing() -> None:
    engine = Engine(threshold=512)
    first, _ = (engine.add(prompt)[0] for prompt in document(2))
    engine.step(2)
    assert set(engine.admitted) == {first}


def test_it_is_waited_for_no_longer_than_what_is_common() -> None:
    engine = Engine()
    engine.add(list(range(LONG)))
    engine.step()
    (other,) = engine.add([*range(BUDGET + 500), *[60_000] * 50])
    engine.step()
    assert other not in engine.admitted
    engine.step()
    assert engine.admitted[other] == engine.sampled[other] == 3
    (row,) = (row for row in engine.plans[-1].rows if row.request_id == other)
    assert row.start == (BUDGET + 500) // 16 * 16


def test_a_prefix_that_nobody_computes_any_more_is_not_waited_for() -> None:
    engine = Engine()
    first, second = (engine.add(prompt)[0] for prompt in document(2))
    engine.step(3)
    assert second not in engine.admitted
    engine.core.handle(AbortRequests([first]))
    engine.step()
    assert engine.admitted[second] == 4
    assert engine.plans[-1].rows[0].start == 3 * BUDGET, "what was computed is found"


@pytest.mark.parametrize("alike", ["no cache", "other salt", "more urgent"])
def test_a_prefix_that_would_not_be_found_or_comes_later_is_not_waited_for(alike: str) -> None:
    engine = Engine(policy="priority", caching=alike != "no cache")
    first, second = document(2)
    engine.add(first)
    engine.step(2)
    (other,) = engine.add(second, priority=-1 if alike == "more urgent" else 0)
    if alike == "other salt":
        engine.scheduler.requests[other].cache_key = CacheKey("a")
    engine.step()
    assert engine.admitted[other] == 3

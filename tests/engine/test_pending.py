"""Requests that wait outside the scheduler for their adapter: who gets memory, who is lost (nobody)."""

from __future__ import annotations

import random

import pytest

from quire.engine.core import EngineCore
from quire.errors import EngineError
from quire.kvcache import KVCacheManager
from quire.messages import (
    AbortRequests,
    AddAdapter,
    Answer,
    Control,
    DropAdapter,
    Failure,
    FinishReason,
    LoadAdapter,
    RequestUpdate,
    Sleep,
    StepOutputs,
    WakeUp,
)
from quire.placement import Placement
from quire.scheduler import DecisionLog, Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.adapters import PATIENCE
from quire.scheduler.invariants import check_invariants
from tests.scheduler.fake_executor import CheckingExecutor, FakeAdapters, expected_output
from tests.scheduler.requests import add_request


class SleepyExecutor(CheckingExecutor):
    def sleep(self, level: int) -> None:
        self.asleep, self.adapters = self.adapters, None

    def wake_up(self) -> None:
        self.adapters = self.asleep
        self.adapters.ready.clear()


class Engine:
    def __init__(
        self, *, places: int = 2, memory: int = 3, num_blocks: int = 200, max_in_flight: int = 1,
        seats: int = 8, policy: str = "fcfs", **options,
    ) -> None:  # fmt: skip
        self.log = DecisionLog()
        self.store = FakeAdapters(memory, **options)
        limits = SchedulerLimits(seats, 64, 60, max_adapters=places, policy=policy)
        kv = KVCacheManager(num_blocks, 4, enable_prefix_caching=True)
        self.scheduler = Scheduler(limits, kv, observe=self.log, clock=lambda: 0.0)
        self.executor = SleepyExecutor(
            num_blocks, 4, adapters=self.store, max_in_flight=max_in_flight, on_plan=self.check
        )
        self.core = EngineCore(
            self.scheduler, self.executor, max_adapters=memory, clock=lambda: 0.0
        )
        self.messages: dict[int, object] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, RequestUpdate] = {}
        self.answers: list[Answer] = []
        self.most_used = 0

    def check(self, plan) -> None:
        used = {
            self.executor.states[row.request_id].adapter
            for row in plan.rows
            if row.request_id in self.executor.states
        } - {None}
        self.most_used = max(self.most_used, len(used))
        assert len(used) <= self.scheduler.limits.max_adapters

    def know(self, *keys: str) -> None:
        for key in keys:
            self.core.handle(AddAdapter(key, f"/adapters/{key}"))

    def add(
        self,
        adapter: str | None,
        max_tokens: int = 4,
        *,
        length: int = 5,
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
    ) -> int:
        leader = len(self.messages) + 1
        for index in range(n):
            request_id = leader + index
            message = add_request(
                request_id, [leader] * length, max_tokens=max_tokens, seed=index,
                arrival_time=float(leader), fork_of=leader if index else None, deadline=deadline,
                placement=Placement(adapter=adapter, priority=priority),
            )  # fmt: skip
            self.messages[request_id] = message
            self.tokens[request_id] = []
            self.note(self.core.handle(message))
        return leader

    def note(self, outputs) -> None:
        if not isinstance(outputs, StepOutputs):
            return
        self.answers += outputs.answers
        self.stats = outputs.stats
        for update in outputs.updates:
            assert update.request_id not in self.ends
            self.tokens[update.request_id] += update.new_token_ids
            if update.finish_reason is not None:
                self.ends[update.request_id] = update

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.note(self.core.step())
            check_invariants(self.scheduler)

    def run(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("not everybody finished")

    def check_outputs(self) -> None:
        """Each request has what it has alone."""
        for request_id, message in self.messages.items():
            end = self.ends[request_id]
            expected = expected_output(
                message.prompt_token_ids, message.decoding.seed, message.decoding.max_tokens,
                adapter=message.placement.adapter,
            )  # fmt: skip
            if end.finish_reason is FinishReason.LENGTH:
                assert self.tokens[request_id] == expected
            else:
                assert self.tokens[request_id] == expected[: len(self.tokens[request_id])]


def test_a_request_waits_for_its_adapter_and_others_go_on() -> None:
    engine = Engine(polls=5)
    engine.know("a@1")
    base, adapted = engine.add(None, 20), engine.add("a@1")
    engine.step(3)
    assert len(engine.tokens[base]) == 3 and not engine.tokens[adapted]
    assert engine.stats.num_waiting == 1 and engine.stats.waiting_by_reason["deferred"] == 1
    assert engine.stats.waiting_adapters == ["a"] and engine.stats.running_adapters == []
    [wait] = engine.log.of(adapted)
    assert wait.reason is WaitReason.ADAPTER
    engine.step(4)
    assert engine.stats.waiting_adapters == [] and engine.stats.running_adapters == ["a"]
    engine.run()
    engine.check_outputs()
    assert engine.store.loads == ["a@1"] and engine.stats.running_adapters == []


def test_an_adapter_stays_in_memory_until_another_needs_the_room() -> None:
    engine = Engine(memory=2, places=2)
    engine.know("a@1", "b@1", "c@1")
    for key in ("a@1", "b@1", "a@1", "c@1", "a@1", "b@1"):
        engine.add(key)
        engine.run()
    assert engine.store.loads == ["a@1", "b@1", "c@1", "b@1"], "b was the least recently used"
    engine.check_outputs()


def test_a_failed_load_ends_only_its_requests() -> None:
    engine = Engine(failing=frozenset({"bad@1"}))
    engine.know("bad@1", "a@1")
    ids = [engine.add(key) for key in ("bad@1", None, "bad@1", "a@1", "unknown@1")]
    engine.run()
    assert [engine.ends[i].finish_reason.value for i in ids] == [
        "error", "length", "error", "length", "error",
    ]  # fmt: skip
    assert engine.ends[ids[0]].error == "The adapter bad cannot be served: it is broken"
    assert engine.ends[ids[4]].error == "The adapter unknown is not loaded."
    engine.store.failing = frozenset()
    again = engine.add("bad@1")
    engine.run()
    assert engine.ends[again].finish_reason is FinishReason.LENGTH, "it is tried again"
    engine.check_outputs()


def test_a_call_to_load_is_answered_when_it_is_done() -> None:
    engine = Engine(polls=3, failing=frozenset({"bad@1"}))
    engine.know("a@1", "bad@1")
    assert engine.core.handle(Control(1, LoadAdapter("a@1"))) is None
    assert engine.core.handle(Control(2, LoadAdapter("bad@1"))) is None
    unknown = engine.core.handle(Control(3, LoadAdapter("c@1")))
    assert isinstance(unknown, Answer) and unknown.failure is not None
    assert engine.core.has_work and not engine.answers
    engine.run()
    failure = Failure("The adapter bad cannot be served: it is broken", "CheckpointError")
    assert engine.answers == [Answer(1, 0), Answer(2, 0, failure)]
    engine.add("a@1")
    engine.run()
    assert engine.store.loads == ["a@1", "bad@1"]


def test_a_dropped_version_is_served_to_those_that_were_accepted() -> None:
    engine = Engine(polls=3)
    engine.know("a@1")
    running = engine.add("a@1", 20)
    engine.step(6)
    waiting = engine.add("a@1", 2)
    engine.core.handle(DropAdapter("a@1"))
    engine.step(3)
    assert engine.store.ready == {"a@1"}
    engine.run()
    assert engine.store.ready == set() and len(engine.tokens[running]) == 20
    assert len(engine.tokens[waiting]) == 2
    late = engine.add("a@1")
    assert engine.ends[late].error == "The adapter a is not loaded."
    engine.know("a@1")
    engine.add("a@1")
    engine.run()
    engine.check_outputs()


def test_a_version_dropped_while_it_loads() -> None:
    engine = Engine(polls=3)
    engine.know("a@1")
    gone = engine.add("a@1")
    engine.step()
    engine.note(engine.core.handle(AbortRequests([gone])))
    engine.core.handle(DropAdapter("a@1"))
    engine.run()
    assert engine.store.ready == set() and engine.ends[gone].finish_reason is FinishReason.ABORT


def test_two_versions_run_side_by_side() -> None:
    engine = Engine(places=2, memory=2)
    engine.know("a@1")
    old = engine.add("a@1", 20)
    engine.step(4)
    engine.know("a@2")
    engine.core.handle(DropAdapter("a@1"))
    new = engine.add("a@2", 20)
    engine.step(4)
    assert engine.store.ready == {"a@1", "a@2"} and engine.stats.running_adapters == ["a"]
    engine.run()
    assert engine.tokens[old] != engine.tokens[new]
    assert engine.store.ready == {"a@2"}
    engine.check_outputs()


def test_sleep_drops_adapters_and_they_are_loaded_again() -> None:
    engine = Engine(polls=2)
    engine.know("a@1")
    engine.add("a@1")
    engine.run()
    assert engine.core.handle(Control(1, Sleep(1))) == Answer(1, 1)
    refused = engine.core.handle(Control(2, LoadAdapter("a@1")))
    assert isinstance(refused, Answer) and refused.failure.kind == "EngineSleepingError"
    assert engine.core.handle(Control(3, WakeUp())) == Answer(3, 0)
    engine.add("a@1")
    engine.run()
    assert engine.store.loads == ["a@1", "a@1"]
    engine.check_outputs()


def test_a_pending_load_refuses_a_sleep() -> None:
    engine = Engine(polls=3)
    engine.know("a@1")
    engine.add("a@1")
    answer = engine.core.handle(Control(1, Sleep(1)))
    assert isinstance(answer, Answer) and answer.failure.kind == EngineError.__name__


def test_adapters_that_are_in_use_do_not_keep_others_out_of_memory() -> None:
    """The bound on starvation, one level above the scheduler's places."""
    engine = Engine(places=1, memory=1)
    engine.know("hot@1", "cold@1")
    engine.add("hot@1", 10)
    engine.step(3)
    cold = engine.add("cold@1", 2)
    started = 0
    for _ in range(20 * PATIENCE):
        engine.add("hot@1", 10)
        engine.step()
        started += 1
        if engine.tokens[cold]:
            break
    else:
        raise AssertionError("it starved")
    assert PATIENCE <= started < 8 * PATIENCE
    engine.run()
    engine.check_outputs()


def test_more_urgent_requests_get_memory_first() -> None:
    engine = Engine(places=1, memory=1, policy="priority", seats=1)
    engine.know("a@1", "b@1", "c@1")
    engine.add("a@1", 20)
    engine.step(3)
    low, high = engine.add("b@1", priority=2), engine.add("c@1", priority=1)
    engine.run()
    assert engine.store.loads == ["a@1", "c@1", "b@1"]
    assert engine.ends.keys() == {1, low, high}


def test_forks_share_their_leaders_prompt() -> None:
    engine = Engine()
    engine.know("a@1")
    leader = engine.add("a@1", n=4, length=17)
    engine.run()
    assert len({tuple(engine.tokens[leader + i]) for i in range(4)}) == 4
    assert engine.executor.tokens_computed < 17 + 3 * 2 + 4 * 4
    engine.check_outputs()


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_storm_loses_nobody(max_in_flight: int, seed: int) -> None:
    """64 adapters, 4 places, 6 in memory; loads, aborts, unloads, reloads and preemptions between steps."""
    rng = random.Random(seed)
    engine = Engine(places=4, memory=6, num_blocks=60, max_in_flight=max_in_flight, polls=2)
    version = dict.fromkeys(range(64), 1)
    for number in version:
        engine.know(f"{number}@1")
    controls = 0
    for _ in range(300):
        number = rng.randrange(64)
        key = f"{number}@{version[number]}"
        match rng.randrange(8):
            case 0:
                live = engine.messages.keys() - engine.ends.keys()
                if live:
                    engine.note(engine.core.handle(AbortRequests([rng.choice(sorted(live))])))
            case 1:
                version[number] += 1
                engine.know(f"{number}@{version[number]}")
                engine.core.handle(DropAdapter(key))
            case 2:
                controls += 1
                engine.core.handle(Control(controls, LoadAdapter(key)))
            case 3:
                engine.add(None, rng.randrange(1, 30), length=rng.randrange(1, 25))
            case _:
                engine.add(
                    key, rng.randrange(1, 30), length=rng.randrange(1, 25), n=rng.choice([1, 1, 2])
                )
        engine.step(rng.choice([0, 1, 1, 2]))
    engine.run()
    assert engine.ends.keys() == engine.messages.keys(), "a request was lost"
    assert all(end.finish_reason is not FinishReason.ERROR for end in engine.ends.values())
    assert len(engine.answers) == controls
    assert engine.most_used == 4 and not engine.scheduler.adapters.in_use
    engine.check_outputs()
    for number, last in version.items():
        engine.core.handle(DropAdapter(f"{number}@{last}"))
    assert engine.store.ready == set(), "what is unloaded leaves the memory"


def test_one_whose_deadline_passes_before_its_adapter_is_there() -> None:
    engine = Engine(polls=10**6)
    engine.know("a@1")
    late, other = engine.add("a@1", deadline=5.0), engine.add(None)
    engine.step(2)
    assert late not in engine.ends
    engine.core._clock = lambda: 5.0
    engine.step()
    assert engine.ends[late].finish_reason is FinishReason.EXPIRED and not engine.tokens[late]
    engine.step(4)
    assert engine.ends[other].finish_reason is FinishReason.LENGTH
    assert not engine.core._pending

"""Loads and saves through a connector: late, out of order, failing, and no token wrong for it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from quire.engine.core import EngineCore
from quire.kvcache import CacheKey, KVCacheManager
from quire.messages import (
    AbortRequests,
    Control,
    FinishReason,
    RequestUpdate,
    ResetPrefixCache,
    Sleep,
    StepOutputs,
    StepPlan,
    Transfer,
)
from quire.placement import Retain
from quire.scheduler import Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.invariants import check_invariants
from tests.scheduler.fake_executor import expected_output
from tests.scheduler.requests import add_request
from tests.scheduler.stores import Store, StoreExecutor, source_of
from tests.scheduler.test_scheduler_properties import (
    DeeperMachine,
    LongPromptMachine,
    OverlappedMachine,
    PipelineMachine,
    WindowMachine,
)


class StoreMachine(WindowMachine):
    layouts = ((None,), (None, 5), (4,), (None, 3, 7))
    drafts = False
    max_in_flight = 1

    def make_connector(self):
        self.store = Store()
        self.sources = [source_of("forged", 8)]
        return self.store

    def make_executor(self, *sizes, **options):
        return StoreExecutor(*sizes, store=self.store, late=3, failing=True, **options)

    def transfers_of(self, data):
        source = data.draw(st.sampled_from([None, None, *self.sources[-3:]]))
        return {"hold_kv": data.draw(st.booleans()), "source": source}

    def retains(self, data):
        seconds, size = st.sampled_from([1.0, 20.0]), st.sampled_from([None, 0, 4, 11])
        return tuple(data.draw(st.lists(st.builds(Retain, seconds, size), max_size=1)))

    def step_once(self):
        self.now += 1.0
        super().step_once()

    @rule(
        saves=st.sampled_from(["all", "evicted", "used"]),
        least_hits=st.integers(0, 2),
        seconds_each=st.sampled_from([0.0, 0.0, 1.0, 100.0]),
        late=st.integers(0, 6),
        failing=st.booleans(),
        refuses_tickets=st.booleans(),
        drops=st.sampled_from([0, 0, 1, 3]),
    )
    @precondition(lambda self: hasattr(self, "store"))
    def change(self, saves, least_hits, seconds_each, late, failing, refuses_tickets, drops):
        store, executor = self.store, self.core.executor
        store.saves, store.least_hits, store.seconds_each = saves, least_hits, seconds_each
        store.refuses_tickets = refuses_tickets
        executor.late, executor.failing, executor.drops = late, failing, drops
        executor.may_be_late = True

    @rule(number=st.integers(0, 20))
    @precondition(lambda self: getattr(self, "store", None) and self.store.blocks)
    def lose(self, number):
        """The store drops a block, and a ticket expires."""
        names = list(self.store.blocks)
        del self.store.blocks[names[number % len(names)]]
        self.store.peers.pop(str(number), None)

    def record(self, outputs):
        super().record(outputs)
        self.sources += [u.kv_source for u in outputs.updates if u.kv_source is not None]

    @invariant()
    @precondition(lambda self: hasattr(self, "store"))
    def leases_are_those_of_waiting_requests(self):
        requests = self.scheduler.requests.values()
        tickets = Counter(r.source.ticket for r in requests if r.source is not None)
        assert +self.store.expected == tickets and min([0, *self.store.expected.values()]) == 0

    def may_be_deferred(self, request):
        return True  # it may be loading

    def first_in_order(self):
        return next(iter(self.scheduler.running), None)


class OverlappedStoreMachine(StoreMachine, OverlappedMachine):
    max_in_flight = 2


class DeeperStoreMachine(StoreMachine, DeeperMachine):
    max_in_flight = 3


class LongStoreMachine(StoreMachine, LongPromptMachine):
    layouts = ((None,), (None, 20))
    max_in_flight = 2


class PipelineStoreMachine(StoreMachine, PipelineMachine):
    max_in_flight = stages = 2


class DraftStoreMachine(OverlappedStoreMachine):
    drafts = True


class FailingStoreMachine(OverlappedStoreMachine):
    """Requests end if their loads do."""

    fails_with_loads = True
    ends_early = (FinishReason.ABORT, FinishReason.ERROR)

    def record(self, outputs):
        super().record(outputs)
        for update in outputs.updates:
            if update.finish_reason is FinishReason.ERROR:
                assert "load" in update.error and not self.outputs[update.request_id]


TestStore = StoreMachine.TestCase
TestOverlappedStore = OverlappedStoreMachine.TestCase
TestDeeperStore = DeeperStoreMachine.TestCase
TestLongStore = LongStoreMachine.TestCase
TestPipelineStore = PipelineStoreMachine.TestCase
TestDraftStore = DraftStoreMachine.TestCase
TestFailingStore = FailingStoreMachine.TestCase
TestStore.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestOverlappedStore.settings = settings(TestStore.settings, max_examples=50)
TestDeeperStore.settings = settings(TestStore.settings, max_examples=30)
TestLongStore.settings = settings(TestStore.settings, max_examples=30)
TestPipelineStore.settings = settings(TestStore.settings, max_examples=30)
TestDraftStore.settings = settings(TestStore.settings, max_examples=30)
TestFailingStore.settings = settings(TestStore.settings, max_examples=30)


class Engine:
    def __init__(
        self,
        *,
        num_blocks: int = 30,
        windows: tuple[int | None, ...] = (None,),
        saves: str = "all",
        late: int = 0,
        fails_with_loads: bool = False,
    ) -> None:
        self.store = Store(saves=saves)
        kv = KVCacheManager(
            num_blocks, 4, enable_prefix_caching=True, windows=windows, max_row_tokens=64
        )
        limits = SchedulerLimits(
            max_num_seqs=4, max_num_batched_tokens=64, max_model_len=40,
            fails_with_loads=fails_with_loads,
        )  # fmt: skip
        self.now = 0.0
        self.scheduler = Scheduler(limits, kv, connector=self.store, clock=lambda: self.now)
        self.plans: list[StepPlan] = []
        self.executor = StoreExecutor(
            num_blocks, 4, store=self.store, late=late, windows=windows, on_plan=self.on_plan
        )
        self.core = EngineCore(self.scheduler, self.executor)
        self.tokens: dict[int, list[int]] = {}
        self.firsts: dict[int, RequestUpdate] = {}
        self.ends: dict[int, RequestUpdate] = {}
        self.step_seconds = 0.0

    def on_plan(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.now += self.step_seconds

    def add(self, request_id: int, prompt: list[int], *, max_tokens: int = 2, **more) -> None:
        self.tokens[request_id] = []
        message = add_request(
            request_id, prompt, max_tokens=max_tokens, arrival_time=float(request_id), **more
        )
        assert self.core.handle(message) is None

    def step(self) -> None:
        outputs = self.core.step()
        assert isinstance(outputs, StepOutputs)
        check_invariants(self.scheduler)
        for update in outputs.updates:
            self.tokens[update.request_id] += update.new_token_ids
            self.firsts.setdefault(update.request_id, update)
            if update.finish_reason is not None:
                self.ends[update.request_id] = update

    def run(self) -> None:
        for _ in range(100):
            if self.core.has_work:
                self.step()
        assert not self.core.has_work, "not everybody finished"
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_usable

    def serve(self, request_id: int, prompt: list[int], **more) -> None:
        self.add(request_id, prompt, **more)
        self.run()

    def forget(self) -> None:
        """The cache loses everything, and the store nothing."""
        self.scheduler.kv.reset_cache()

    def starts(self, request_id: int) -> list[int]:
        return [
            row.start for plan in self.plans for row in plan.rows if row.request_id == request_id
        ]

    def waits(self, request_id: int) -> WaitReason:
        return self.scheduler.why_waits(self.scheduler.requests[request_id]).reason

    def loads(self) -> list[Transfer]:
        return [transfer for plan in self.plans for transfer in plan.loads]

    def delay_next_load(self) -> None:
        """Three plans, with `late` 3; seven with 12."""
        self.scheduler.loading.transfers._next_id = 1


PROMPT = list(range(22))


def test_what_a_request_leaves_is_saved_and_loaded_when_the_cache_has_forgotten_it() -> None:
    engine = Engine(saves="used")
    engine.serve(1, PROMPT)
    assert engine.executor.num_saved == 5
    engine.forget()
    engine.add(2, [*PROMPT[:18], 90, 91])
    engine.step()
    assert engine.waits(2) is WaitReason.LOAD
    assert engine.scheduler.take_stats().waiting_by_reason["deferred"] == 1
    engine.run()
    assert engine.starts(2)[0] == 16 and engine.executor.num_loaded == 4
    assert engine.tokens[2] == expected_output([*PROMPT[:18], 90, 91], 0, 2)


def test_what_is_evicted_is_saved_by_the_plan_that_overwrites_it() -> None:
    engine = Engine(num_blocks=1 + 10, saves="evicted")
    engine.serve(1, PROMPT)
    engine.serve(2, [20] * 30, max_tokens=4)
    assert engine.executor.num_saved == 4, "the head of the first is evicted last"
    for plan in engine.plans:
        given = [*(admitted.block_ids for admitted in plan.admitted)]
        given += [row.new_block_ids for row in plan.rows if row.new_block_ids]
        taken = {block_id for (block_ids,) in given for block_id in block_ids}
        assert all(taken.issuperset(save.block_ids) for save in plan.saves)
    engine.serve(5, PROMPT)
    assert engine.starts(5)[0] == 20
    assert engine.tokens[5] == expected_output(PROMPT, 0, 2)


def test_what_the_same_plan_evicts_can_be_loaded() -> None:
    engine = Engine(num_blocks=1 + 10, saves="evicted")
    engine.serve(1, PROMPT)
    engine.serve(2, [20] * 30, max_tokens=4)
    engine.add(3, [60] * 10)
    engine.add(4, PROMPT)
    engine.step()
    assert engine.plans[-1].saves and engine.waits(4) is WaitReason.LOAD
    engine.run()
    assert engine.starts(4)[0] == 20 and engine.executor.num_loaded == 5


def test_a_block_is_saved_once_it_has_been_found_often_enough() -> None:
    engine = Engine(saves="used")
    engine.store.least_hits = 2
    engine.serve(1, PROMPT)
    engine.serve(2, [*PROMPT[:9], 70])
    assert not engine.executor.num_saved
    engine.serve(3, [*PROMPT[:9], 80])
    assert engine.executor.num_saved == 2


def test_what_the_same_plan_computes_is_not_saved_yet() -> None:
    engine = Engine(saves="used")
    engine.add(1, PROMPT)
    engine.add(2, [*PROMPT[:9], 70])
    engine.step()
    assert engine.plans[0].admitted[1].request_id == 2 and not engine.plans[0].saves
    engine.run()
    assert engine.executor.num_saved == 5


def test_what_the_last_step_of_a_request_computed_is_saved() -> None:
    engine = Engine(saves="used")
    engine.serve(1, PROMPT, max_tokens=1)
    assert len(engine.plans[0].rows) == 1 and engine.executor.num_saved == 5


def test_what_was_found_stays_until_the_rest_is_loaded() -> None:
    engine = Engine(saves="used", late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.serve(2, PROMPT[:9])
    engine.delay_next_load()
    engine.add(9, [50] * 6, max_tokens=20)
    engine.add(3, PROMPT)
    engine.step()
    (found,) = engine.scheduler.kv.match_prefix(3, PROMPT, CacheKey(), 99).blocks
    assert [block.ref_count for block in found] == [1, 1]
    engine.run()
    assert engine.starts(3)[0] == 20 and engine.executor.num_loaded == 2 + 3


def test_only_what_a_window_reads_is_loaded() -> None:
    engine = Engine(num_blocks=60, windows=(None, 6), saves="used")
    engine.serve(1, PROMPT)
    engine.forget()
    engine.serve(2, PROMPT)
    assert engine.starts(2)[0] == 20 and engine.executor.num_loaded == 5 + 2
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_of_a_window_as_much_is_loaded_as_can_be_used() -> None:
    engine = Engine(num_blocks=60, windows=(None, 6), saves="used")
    engine.serve(1, PROMPT)
    hashes = engine.scheduler.kv.hashes_of(9, PROMPT, CacheKey())
    engine.store.blocks.pop((hashes[4], 1))
    engine.forget()
    engine.serve(2, PROMPT)
    assert engine.starts(2)[0] == 16


def test_a_load_that_fails_keeps_its_good_prefix() -> None:
    engine = Engine(saves="used", late=2)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.executor.failing = True
    engine.scheduler.loading.transfers._next_id = 3
    engine.serve(2, PROMPT)
    assert engine.starts(2)[0] == 8, "two of five blocks came"
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_a_request_may_end_if_its_load_fails() -> None:
    engine = Engine(saves="used", fails_with_loads=True)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.executor.failing = True
    engine.scheduler.loading.transfers._next_id = 3
    engine.add(2, PROMPT)
    engine.add(3, PROMPT)  # waits for the same load, then tries its own
    engine.run()
    assert engine.ends[2].finish_reason is FinishReason.ERROR and "load" in engine.ends[2].error
    assert engine.tokens[3] == expected_output(PROMPT, 0, 2)
    assert [transfer.transfer_id for transfer in engine.loads()] == [3, 4]


def test_a_load_outlives_its_request() -> None:
    engine = Engine(saves="used", late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.delay_next_load()
    engine.add(9, [50] * 6, max_tokens=20)
    engine.add(2, PROMPT)
    engine.step()
    engine.core.handle(AbortRequests([2, 9]))
    assert engine.core.has_work and not engine.scheduler.requests
    engine.run()
    engine.add(3, PROMPT)
    engine.step()
    assert engine.starts(3) == [20], "it is found in the cache"


def test_a_reset_drops_what_is_stored_and_what_is_being_loaded() -> None:
    engine = Engine(late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.delay_next_load()
    engine.add(2, PROMPT)
    engine.add(9, [50] * 6, max_tokens=20)
    engine.step()
    engine.core.handle(Control(0, ResetPrefixCache()))
    engine.run()
    assert engine.starts(2)[0] == 0, "what was loaded is not used"
    assert [plan.clears_stores for plan in engine.plans].count(True) == 1
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)
    engine.core.handle(Control(0, ResetPrefixCache()))
    assert engine.core.has_work
    engine.run()
    assert not engine.store.blocks and not engine.core.has_work


def test_all_may_be_loaded_into_a_pool_of_one_sequence() -> None:
    engine = Engine(num_blocks=1 + 10, saves="all")
    for request_id, token in enumerate((10, 11, 10, 11), 1):
        engine.serve(request_id, [token] * 37)
        assert engine.tokens[request_id] == expected_output([token] * 37, 0, 2)
    assert [engine.starts(3)[0], engine.starts(4)[0]] == [36, 36]


def test_a_request_that_runs_alone_waits_for_blocks_that_a_load_holds() -> None:
    engine = Engine(num_blocks=1 + 10, saves="used", late=12)
    engine.serve(1, [10] * 30)
    engine.forget()
    engine.add(3, [12] * 7, max_tokens=30)
    engine.step()
    engine.delay_next_load()
    engine.add(4, [10] * 30)
    for _ in range(6):
        engine.step()
    assert engine.waits(3) is WaitReason.LOAD and engine.waits(4) is WaitReason.LOAD
    assert engine.scheduler.requests[3].num_preemptions == 0
    engine.run()
    assert engine.ends[3].num_preemptions == 0
    for request_id, prompt, count in ((3, [12] * 7, 30), (4, [10] * 30, 2)):
        assert engine.tokens[request_id] == expected_output(prompt, 0, count)


def test_those_after_it_leave_the_blocks_that_a_loading_request_will_need() -> None:
    engine = Engine(num_blocks=1 + 12, saves="used", late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.delay_next_load()
    engine.add(2, PROMPT + [90] * 10)
    engine.add(3, [50] * 19)
    engine.add(4, [51] * 9)
    engine.step()
    assert [engine.waits(r) for r in (2, 3)] == [WaitReason.LOAD, WaitReason.BLOCKS]
    engine.run()
    assert engine.starts(2)[0] == 20


def test_a_load_may_take_the_block_that_the_same_plan_copies() -> None:
    """Of a request whose prompt is cached as a whole, the last block is copied; then it is free again."""
    engine = Engine(num_blocks=1 + 10, saves="used", late=3)
    engine.serve(1, list(range(100, 132)))
    engine.forget()
    prompt = list(range(8))
    engine.serve(2, prompt, max_tokens=1)
    engine.add(3, prompt)
    engine.add(4, list(range(100, 132)))
    engine.run()
    both = [plan for plan in engine.plans if plan.copies and plan.loads]
    assert {source for source, _ in both[0].copies} <= set(both[0].loads[0].block_ids)
    assert engine.tokens[3] == expected_output(prompt, 0, 2)


def test_a_load_must_take_less_time_than_to_compute_and_gets_no_more() -> None:
    engine = Engine(saves="used")
    engine.step_seconds = 2.2
    engine.serve(1, PROMPT)
    assert engine.scheduler.costs.prompt_seconds(20) == pytest.approx(2.0)
    engine.forget()
    engine.store.seconds_each = 0.401
    engine.serve(2, PROMPT)
    assert not engine.loads()
    engine.forget()
    engine.store.seconds_each = 0.39
    engine.serve(3, PROMPT)
    (load,) = engine.loads()
    assert load.timeout == pytest.approx(2.0) and engine.starts(3)[0] == 20


def test_the_full_blocks_of_a_prompt_are_held_for_another_instance() -> None:
    engine = Engine(windows=(None, 6), num_blocks=60, saves="evicted")
    engine.serve(1, PROMPT, max_tokens=1, hold_kv=True)
    source = engine.ends[1].kv_source
    assert source.num_tokens == 20 and len(engine.store.peers[source.ticket]) == 5 + 2
    other = Engine(windows=(None, 6), num_blocks=60)
    other.store.peers = engine.store.peers
    other.serve(2, PROMPT, source=source)
    assert other.starts(2)[0] == 20 and other.executor.num_loaded == 7
    assert other.tokens[2] == expected_output(PROMPT, 0, 2)


def test_of_a_request_that_is_aborted_or_cannot_be_held_nothing_is_held() -> None:
    engine = Engine()
    engine.store.refuses_tickets = True
    engine.serve(1, PROMPT, max_tokens=1, hold_kv=True)
    assert engine.ends[1].kv_source is None and not engine.store.peers
    engine.store.refuses_tickets = False
    engine.add(2, PROMPT, max_tokens=5, hold_kv=True)
    engine.step()
    (update,) = engine.core.handle(AbortRequests([2])).updates
    engine.run()
    assert update.kv_source is None and not engine.store.peers


def test_a_lease_is_renewed_until_the_request_is_admitted_or_ends() -> None:
    engine = Engine(num_blocks=12, late=3)
    engine.add(1, list(range(50, 74)), max_tokens=16)
    engine.step()
    sources = [source_of("a", 8), source_of("b", 8)]
    engine.add(2, PROMPT, source=sources[0])
    engine.add(3, PROMPT, source=sources[1])
    engine.step()
    assert engine.store.expected == {"a": 1, "b": 1}
    engine.core.handle(AbortRequests([3]))
    assert +engine.store.expected == {"a": 1}
    engine.run()
    assert not +engine.store.expected
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_a_source_that_lacks_the_kv_costs_only_time() -> None:
    engine = Engine()
    engine.serve(1, PROMPT, source=source_of("expired", 4000))
    assert engine.starts(1)[0] == 0
    assert engine.tokens[1] == expected_output(PROMPT, 0, 2)


def test_sleep_waits_until_the_stores_are_cleared() -> None:
    engine = Engine()
    engine.serve(1, PROMPT)
    engine.executor.sleep = lambda level: engine.plans.append(level)
    answer = engine.core.handle(Control(0, Sleep(1)))
    assert answer.failure is None and engine.plans[-1] == 1
    assert engine.plans[-2].clears_stores and not engine.core.has_work

"""Loads and saves through a connector: late, out of order, failing, and no token wrong for it."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings

from quire.engine.core import EngineCore
from quire.kvcache import CacheKey, KVCacheManager
from quire.messages import AbortRequests, BlockName, StepOutputs, StepPlan, Transfer, TransferResult
from quire.scheduler import Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.invariants import check_invariants
from tests.scheduler.fake_executor import CheckingExecutor, expected_output
from tests.scheduler.requests import add_request
from tests.scheduler.test_scheduler_properties import OverlappedMachine, WindowMachine


class Store:
    """A connector and what it connects to: slots by name."""

    def __init__(self, *, keeps: str = "all") -> None:
        """keeps: "all", or only what is "evicted" or "finished"."""
        self.blocks: dict[BlockName, list[object]] = {}
        self.keeps = keeps

    def lookup(self, names: Sequence[BlockName]) -> int:
        for count, name in enumerate(names):
            if name not in self.blocks:
                return count
        return len(names)

    def on_evict(self, name: BlockName) -> bool:
        return self.keeps != "finished" and name not in self.blocks

    def on_finish(self, request_id: int, names: Sequence[BlockName]) -> bool:
        return self.keeps != "evicted" and self.lookup(names) < len(names)


class StoreExecutor(CheckingExecutor):
    """Carries transfers out some plans after the one that has them."""

    def __init__(self, *sizes: int, store: Store, late: int = 0, failing: bool = False, **options):
        super().__init__(*sizes, **options)
        self.store, self.late, self.failing = store, late, failing
        self.under_way: list[tuple[int, bool, Transfer]] = []
        self.num_loaded = self.num_saved = 0

    def load(self, plan: StepPlan) -> list[TransferResult]:
        self.under_way += [(self.due(plan, transfer), True, transfer) for transfer in plan.loads]
        return self.carry_out(plan, True)

    def save(self, plan: StepPlan) -> list[TransferResult]:
        self.under_way += [(self.due(plan, transfer), False, transfer) for transfer in plan.saves]
        done = self.carry_out(plan, False)
        if not plan.rows and self.under_way and not done:
            self.under_way.insert(0, (0, *self.under_way.pop()[1:]))
            done = self.carry_out(plan, True) + self.carry_out(plan, False)
        return done

    def due(self, plan: StepPlan, transfer: Transfer) -> int:
        return plan.step_id + transfer.transfer_id * 7 % (self.late + 1)

    def carry_out(self, plan: StepPlan, loads: bool) -> list[TransferResult]:
        done = [one for one in self.under_way if one[0] <= plan.step_id and one[1] is loads]
        self.under_way = [one for one in self.under_way if one not in done]
        return [self.move(transfer, loads) for _, _, transfer in done]

    def move(self, transfer: Transfer, loads: bool) -> TransferResult:
        good, size = len(transfer.names), self.block_size
        if self.failing and transfer.transfer_id % 3 == 0:
            good //= 2
        pairs = list(zip(transfer.names, transfer.block_ids, strict=True))
        for name, block_id in pairs[:good]:
            slots = slice(block_id * size, (block_id + 1) * size)
            if loads:
                self.slots[slots] = self.store.blocks[name]
            else:
                self.store.blocks[name] = self.slots[slots]
        for _, block_id in pairs[good:] if loads else ():
            self.slots[block_id * size : (block_id + 1) * size] = [None] * size
        self.num_loaded += good * loads
        self.num_saved += good * (not loads)
        return TransferResult(transfer_id=transfer.transfer_id, num_good=good)


class StoreMachine(WindowMachine):
    layouts = ((None,), (None, 5), (4,), (None, 3, 7))
    drafts = False
    max_in_flight = 1

    def make_connector(self):
        self.store = Store()
        return self.store

    def make_executor(self, *sizes, **options):
        return StoreExecutor(*sizes, store=self.store, late=3, failing=True, **options)

    def may_be_deferred(self, request):
        return True  # it may be loading

    def first_in_order(self):
        return next(iter(self.scheduler.running), None)


class OverlappedStoreMachine(StoreMachine, OverlappedMachine):
    max_in_flight = 2


TestStore = StoreMachine.TestCase
TestOverlappedStore = OverlappedStoreMachine.TestCase
TestStore.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestOverlappedStore.settings = settings(TestStore.settings, max_examples=50)


class Engine:
    def __init__(
        self,
        *,
        num_blocks: int = 30,
        windows: tuple[int | None, ...] = (None,),
        keeps: str = "all",
        late: int = 0,
        failing: bool = False,
    ) -> None:
        self.store = Store(keeps=keeps)
        kv = KVCacheManager(
            num_blocks, 4, enable_prefix_caching=True, windows=windows, max_row_tokens=64
        )
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=40)
        self.scheduler = Scheduler(limits, kv, connector=self.store)
        self.plans: list[StepPlan] = []
        self.executor = StoreExecutor(
            num_blocks, 4, store=self.store, late=late, failing=failing, windows=windows,
            on_plan=self.plans.append,
        )  # fmt: skip
        self.core = EngineCore(self.scheduler, self.executor)
        self.tokens: dict[int, list[int]] = {}

    def add(self, request_id: int, prompt: list[int], *, max_tokens: int = 2) -> None:
        self.tokens[request_id] = []
        message = add_request(
            request_id, prompt, max_tokens=max_tokens, arrival_time=float(request_id)
        )
        assert self.core.handle(message) is None

    def step(self) -> None:
        outputs = self.core.step()
        assert isinstance(outputs, StepOutputs)
        check_invariants(self.scheduler)
        for update in outputs.updates:
            self.tokens[update.request_id] += update.new_token_ids

    def run(self) -> None:
        for _ in range(100):
            if self.core.has_work:
                self.step()
        assert not self.core.has_work, "not everybody finished"
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_usable

    def starts(self, request_id: int) -> list[int]:
        return [
            row.start for plan in self.plans for row in plan.rows if row.request_id == request_id
        ]


PROMPT = list(range(22))


def test_what_a_request_leaves_is_saved_and_loaded_when_the_cache_has_forgotten_it() -> None:
    engine = Engine(keeps="finished")
    engine.add(1, PROMPT)
    engine.run()
    assert engine.executor.num_saved == 5
    engine.scheduler.kv.reset_cache()
    engine.add(2, [*PROMPT[:18], 90, 91])
    engine.step()
    request = engine.scheduler.requests[2]
    assert engine.scheduler.why_waits(request).reason is WaitReason.LOAD
    assert engine.scheduler.take_stats().waiting_by_reason["deferred"] == 1
    engine.run()
    assert engine.starts(2)[0] == 16 and engine.executor.num_loaded == 4
    assert engine.tokens[2] == expected_output([*PROMPT[:18], 90, 91], 0, 2)


def test_what_is_evicted_is_saved_before_and_no_request_waits_for_that() -> None:
    engine = Engine(num_blocks=1 + 16, keeps="evicted")
    engine.add(1, PROMPT)
    engine.run()
    for request_id in (2, 3, 4):
        engine.add(request_id, [request_id * 10] * 30, max_tokens=4)
        engine.run()
    assert engine.executor.num_saved > 5
    found = engine.scheduler.kv.match_prefix(9, PROMPT, CacheKey(), 10**6).num_tokens
    assert found < 20
    engine.add(5, PROMPT)
    engine.run()
    assert engine.starts(5)[0] == 20
    assert engine.tokens[5] == expected_output(PROMPT, 0, 2)


def test_what_was_saved_is_evicted_first() -> None:
    engine = Engine()
    engine.add(1, PROMPT)
    engine.run()
    kv, transfers = engine.scheduler.kv, engine.scheduler.transfers
    block = next(block for block in kv.pool.next_free(29) if block.content is not None)
    transfers.save([(block.content.block_hash, 0)], [block])
    check_invariants(engine.scheduler)
    (transfer,) = transfers.take()[1]
    transfers.finish(transfer.transfer_id, 1, 9)
    assert kv.pool.next_free(1) == [block] and block.content is not None


def test_what_was_found_stays_until_the_rest_is_loaded() -> None:
    engine = Engine(keeps="finished", late=3)
    engine.add(1, PROMPT)
    engine.run()
    engine.scheduler.kv.reset_cache()
    engine.add(2, PROMPT[:9])
    engine.run()
    engine.scheduler.transfers._next_id = 1  # three plans late
    engine.add(9, [50] * 6, max_tokens=20)
    engine.add(3, PROMPT)
    engine.step()
    (found,) = engine.scheduler.kv.match_prefix(3, PROMPT, CacheKey(), 99).blocks
    assert [block.ref_count for block in found] == [1, 1]
    engine.run()
    assert engine.starts(3)[0] == 20 and engine.executor.num_loaded == 2 + 3


def test_only_what_a_window_reads_is_loaded() -> None:
    engine = Engine(num_blocks=60, windows=(None, 6), keeps="finished")
    engine.add(1, PROMPT)
    engine.run()
    names = {group: sum(name[1] == group for name in engine.store.blocks) for group in (0, 1)}
    assert names[0] == 5 and 0 < names[1] < 5
    engine.scheduler.kv.reset_cache()
    engine.add(2, PROMPT)
    engine.run()
    assert engine.starts(2)[0] == 20 and engine.executor.num_loaded == 5 + 2
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_a_load_that_fails_is_computed() -> None:
    engine = Engine(keeps="finished", late=2)
    engine.add(1, PROMPT)
    engine.run()
    engine.scheduler.kv.reset_cache()
    engine.executor.failing = True
    engine.scheduler.transfers._next_id = 3
    engine.add(2, PROMPT)
    engine.run()
    assert engine.starts(2)[0] == 8, "two of five blocks came"
    assert engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_a_load_outlives_its_request() -> None:
    engine = Engine(keeps="finished", late=3)
    engine.add(1, PROMPT)
    engine.run()
    engine.scheduler.kv.reset_cache()
    engine.scheduler.transfers._next_id = 1  # three plans late
    engine.add(9, [50] * 6, max_tokens=20)
    engine.add(2, PROMPT)
    engine.step()
    engine.core.handle(AbortRequests([2, 9]))
    assert engine.core.has_work and not engine.scheduler.requests
    engine.run()
    engine.add(3, PROMPT)
    engine.step()
    assert engine.starts(3) == [20], "it is found in the cache"


def test_transfers_leave_the_blocks_of_one_request_of_full_length() -> None:
    engine = Engine(num_blocks=1 + 12, keeps="finished", late=3)
    engine.add(1, PROMPT)
    engine.run()
    assert engine.executor.num_saved == 0, "five blocks, where two may be held"

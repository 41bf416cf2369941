"""Each reason for which a prompt's KV is not found, told by the scheduler itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import (
    BlockContent,
    BlockPool,
    CacheKey,
    KVCacheManager,
    PrefixMatch,
    hash_block,
    misses,
)
from quire.kvcache.misses import Evictions, Loaded, Misses
from quire.messages import (
    Control,
    RequestUpdate,
    ResetPrefixCache,
    StepOutputs,
    TransferResult,
)
from quire.placement import Placement
from quire.prefix_report import MissReason, PrefixReport
from quire.scheduler import Scheduler, SchedulerLimits
from tests.scheduler.requests import add_request
from tests.scheduler.stores import source_of
from tests.scheduler.test_transfers import Engine as StoreEngine

BS = 4
PROMPT = list(range(100, 100 + 4 * BS + 2))


class Engine:
    """Blocks of four tokens. The clock is the step's number."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        caching: bool = True,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        kv = KVCacheManager(
            num_blocks, BS, enable_prefix_caching=caching, windows=windows, max_row_tokens=64
        )
        limits = SchedulerLimits(4, 64, max_model_len=32, watermark_blocks=0)
        self.now = 0.0
        self.scheduler = Scheduler(limits, kv, clock=lambda: self.now)
        executor = MockExecutor(lambda request_id, index: 7)
        self.core = EngineCore(self.scheduler, executor, clock=lambda: self.now)
        self.next_id = 1

    def add(self, prompt: list[int], **fields: Any) -> int:
        request_id, self.next_id = self.next_id, self.next_id + 1
        fields = {"max_tokens": 1, **fields}
        self.scheduler.add_request(add_request(request_id, prompt, **fields))
        return request_id

    def updates(self) -> list[RequestUpdate]:
        found = []
        for _ in range(40):
            if not self.core.has_work:
                return found
            self.now += 1.0
            outputs = self.core.step()
            assert isinstance(outputs, StepOutputs)
            found += outputs.updates
        raise AssertionError("it did not end")

    def run(self, prompt: list[int], **fields: Any) -> PrefixReport:
        request_id = self.add(prompt, **fields)
        (report,) = [
            update.prefix
            for update in self.updates()
            if update.request_id == request_id and update.prefix
        ]
        assert report.cached + report.computed == len(prompt)
        return report

    def fill(self, first: int = 1000) -> None:
        """Other prompts take every block of the cache."""
        for start in range(first, first + 10 * self.scheduler.kv.num_usable, 31):
            self.run(list(range(start, start + 31)))

    def reset(self) -> None:
        self.core.handle(Control(1, ResetPrefixCache()))


def why(report: PrefixReport) -> tuple[MissReason, int]:
    return report.reason, report.cached


def test_a_prompt_that_is_new_and_one_that_is_known() -> None:
    engine = Engine()
    first = engine.run(PROMPT)
    assert first == PrefixReport(computed=18, reason=MissReason.UNSEEN)
    again = engine.run(PROMPT)
    assert again == PrefixReport(device=16, computed=2, reason=MissReason.BOUNDARY)
    assert why(engine.run([*PROMPT[:16], 1])) == (MissReason.WHOLE, 16)
    assert why(engine.run(PROMPT[:16])) == (MissReason.WHOLE, 15), "its last block is copied"
    assert why(engine.run([*PROMPT[:10], *[5] * 8])) == (MissReason.UNSEEN, 8)
    assert why(engine.run([3])) == (MissReason.WHOLE, 0)
    assert why(engine.run([3, 3])) == (MissReason.BOUNDARY, 0)


def test_forks_share_all_but_the_last_token() -> None:
    engine = Engine()
    leader = engine.add(PROMPT, max_tokens=2)
    for _ in range(2):
        engine.add(PROMPT, max_tokens=2, fork_of=leader)
    reports = [update.prefix for update in engine.updates() if update.prefix]
    assert [why(report) for report in reports] == [
        (MissReason.UNSEEN, 0), (MissReason.WHOLE, 17), (MissReason.WHOLE, 17),
    ]  # fmt: skip


def test_without_a_prefix_cache() -> None:
    engine = Engine(caching=False)
    for _ in range(2):
        assert why(engine.run(PROMPT)) == (MissReason.OFF, 0)


@pytest.mark.parametrize(("start", "found"), [(1, 0), (9, 8), (12, 11), (17, 16)])
def test_a_request_that_wants_logprobs_of_its_prompt(start: int, found: int) -> None:
    engine = Engine()
    engine.run(PROMPT)
    fields = {"prompt_logprobs": 1, "first_prompt_logprob": start}
    assert why(engine.run(PROMPT, **fields)) == (MissReason.CAPPED, found)
    assert why(engine.run(PROMPT, reads_prefix_cache=False)) == (MissReason.CAPPED, 0)


def test_a_block_that_was_evicted_and_when() -> None:
    engine = Engine(num_blocks=24)
    engine.run(PROMPT)
    engine.fill()
    seen = engine.scheduler._step_id
    engine.now += 100.0
    report = engine.run(PROMPT)
    assert why(report) == (MissReason.EVICTED, 0)
    assert 1 < report.since_step <= seen
    assert report.seconds_ago == 100.0 + seen + 1 - report.since_step
    assert why(engine.run([*PROMPT[:16], 1])) == (MissReason.WHOLE, 16), "it is there again"
    assert str(report).startswith("18 computed; at 0: evicted 1")


def test_the_record_of_evictions_is_bounded() -> None:
    record = Evictions(most=3)
    hashes = [bytes([index]) for index in range(10)]
    for step, block_hash in enumerate(hashes):
        record.now = (step, 0.5 * step)
        record.removed(BlockContent(block_hash, CacheKey(), (1,), [None]), 0)
    found = [record.find(block_hash) for block_hash in hashes]
    assert found[6:] == [(MissReason.EVICTED, (step, 0.5 * step)) for step in range(6, 10)]
    assert found[:5] == [None] * 5


def test_a_reset_and_an_eviction_before_or_after_it() -> None:
    engine = Engine(num_blocks=24)
    engine.run(PROMPT)
    engine.reset()
    at = engine.scheduler._step_id
    report = engine.run(PROMPT)
    assert (why(report), report.since_step) == ((MissReason.RESET, 0), at)
    engine.fill()
    assert why(engine.run(PROMPT)) == (MissReason.EVICTED, 0), "the last time is what counts"
    engine.fill(2000)
    engine.reset()
    assert why(engine.run(PROMPT)) == (MissReason.EVICTED, 0), "it was not there any more"


def test_the_same_prompt_under_another_salt_or_adapter() -> None:
    engine = Engine()

    def ask(prompt: list[int], salt: str | None = None, adapter: str | None = None) -> PrefixReport:
        return engine.run(prompt, placement=Placement(cache_salt=salt, adapter=adapter))

    assert why(ask(PROMPT, "a")) == (MissReason.UNSEEN, 0)
    foreign = ask(PROMPT, "b")
    assert why(foreign) == (MissReason.SALT, 0)
    assert why(foreign.for_client()) == (MissReason.UNSEEN, 0), "clients are not told"
    assert why(ask(PROMPT, "a", "x@1")) == (MissReason.ADAPTER, 0)
    assert why(ask(PROMPT, "a", "x@1").for_client()) == (MissReason.BOUNDARY, 16)
    longer = [*PROMPT, 50, 51]
    assert why(ask(longer, "b")) == (MissReason.UNSEEN, 16), "nobody has more of it"
    longer += [52, 53, 54, 55, 56]
    ask(longer, "a")
    assert why(ask(longer, "b")) == (MissReason.SALT, 20)
    assert why(ask([9] * 9)) == (MissReason.UNSEEN, 0)


def test_other_keys_are_looked_up_for_as_long_regardless_of_what_they_have(monkeypatch) -> None:
    """Else the time to the first token would tell whether another tenant has used the prompt."""
    computed: list[int] = []

    def counting(parent: bytes, tokens: list[int]) -> bytes:
        computed.append(len(tokens))
        return hash_block(parent, tokens)

    engine = Engine()
    for salt in map(str, range(misses.MOST_KEYS + 5)):
        engine.run([*PROMPT[:8], int(salt)] * 2, placement=Placement(cache_salt=salt))
    monkeypatch.setattr(misses, "hash_block", counting)
    costs = []
    for prompt in ([*PROMPT[:8], 3] * 2, [*PROMPT[:8], 1], [*PROMPT[:4], 1, 1, 1, 1, 1], [9] * 18):
        engine.run(prompt, placement=Placement(cache_salt="mine" + str(prompt)))
        costs.append(len(computed))
        computed.clear()
    assert set(costs) == {misses.MOST_KEYS - 1}
    engine.run([9] * 28, placement=Placement(cache_salt="mine" + str([9] * 18)))
    assert len(computed) == misses.MOST_HASHED // 5 * 5, "the block at 16 is the fifth"


def test_a_block_behind_a_window_that_only_some_layers_lost() -> None:
    engine = Engine(windows=(None, 6), num_blocks=80)
    long = list(range(200, 228))
    engine.run(long)
    content = engine.scheduler.kv.find_chain(99, long, CacheKey())[-2]
    lost = content.blocks[1]
    assert lost is not None
    engine.scheduler.kv.pool._forget(lost)
    assert engine.scheduler.kv.pool.get(content.block_hash) is content
    report = engine.run([*long, 1])
    assert report.reason is MissReason.EVICTED and report.since_step == 0


class Store:
    def __init__(self, names: set[bytes]) -> None:
        self.names = names

    def lookup(self, names: list[tuple[bytes, int]], source: object = None, start: int = 0) -> int:
        count = 0
        for name, _ in names:
            if name not in self.names:
                break
            count += 1
        return count


class Sought:
    request_id, cache_key, most_cached, source = 1, CacheKey(), None, None

    def __init__(self, prompt: list[int]) -> None:
        self.token_ids = prompt


def report_load(found: int, load: Loaded | None, has: bool = False) -> PrefixReport:
    """For PROMPT, of which the cache has `found` tokens at its admission."""
    kv = KVCacheManager(9, BS, enable_prefix_caching=True)
    hashes = kv.hashes_of(1, PROMPT, CacheKey())
    store: Any = Store(set(hashes) if has else set())
    match = PrefixMatch(found, [[]])
    return Misses(kv, store, lambda: 0.0).report(Sought(PROMPT), match, load)


def loaded(num_good: int, late: bool = False, **sources: int) -> Loaded:
    """Of three blocks after the first."""
    result = TransferResult(transfer_id=1, num_good=num_good, sources=sources, late=late)
    return Loaded.after(None, 4, num_good == 3, result)


def test_what_was_loaded_is_counted_by_where_it_was() -> None:
    report = report_load(16, loaded(3, ram=1, disk=1, peer=1))
    assert (report.device, report.ram, report.disk, report.peer) == (4, 4, 4, 4)
    assert report.external == 12 and why(report) == (MissReason.BOUNDARY, 16)
    assert str(report) == (
        "4 from device, 4 from ram, 4 from disk, 4 from peer, 2 computed; at 16: block_boundary"
    )


def test_a_load_that_failed_or_was_late_or_found_no_room() -> None:
    report = report_load(8, loaded(1, disk=1))
    assert (report.device, report.disk) == (4, 4) and why(report) == (MissReason.LOAD_FAILED, 8)
    assert why(report_load(4, loaded(0, late=True))) == (MissReason.LOAD_LATE, 4)
    assert why(report_load(4, None, has=True)) == (MissReason.NOT_LOADED, 4)
    assert why(report_load(4, None)) == (MissReason.UNSEEN, 4)


def serve(engine: StoreEngine, request_id: int, prompt: list[int], **more: Any) -> PrefixReport:
    engine.serve(request_id, prompt, **more)
    report = engine.firsts[request_id].prefix
    assert report is not None and report.cached + report.computed == len(prompt)
    return report


def test_the_scheduler_reports_what_was_loaded() -> None:
    engine = StoreEngine(saves="used")
    take_stats, taken = engine.scheduler.take_stats, []
    engine.scheduler.take_stats = lambda: taken.append(take_stats()) or taken[-1]
    serve(engine, 1, PROMPT)
    engine.forget()
    serve(engine, 2, PROMPT[:9])
    report = serve(engine, 3, PROMPT)
    assert (report.device, report.ram, report.peer) == (8, 8, 0)
    assert why(report) == (MissReason.BOUNDARY, 16)
    assert sum(stats.prefix_queries for stats in taken) == 18 + 9 + 18
    assert sum(stats.prefix_hits for stats in taken) == 8, "of the cache alone, as vLLM counts"
    other = StoreEngine()
    source = source_of("t", 16)
    other.store.peers = {"t": engine.store.blocks}
    assert serve(other, 1, PROMPT, source=source).peer == 16
    assert serve(other, 2, PROMPT).device == 16
    assert not other.scheduler.loading._loaded and not other.scheduler.loading._found


def test_the_scheduler_reports_a_load_that_did_not_succeed() -> None:
    engine = StoreEngine(saves="used")
    serve(engine, 1, PROMPT)
    engine.forget()
    engine.executor.failing = True
    engine.scheduler.loading.transfers._next_id = 3
    report = serve(engine, 2, PROMPT)
    assert (report.ram, why(report)) == (8, (MissReason.LOAD_FAILED, 8))
    report = serve(StoreEngine(), 1, PROMPT, source=source_of("expired", 16))
    assert why(report) == (MissReason.LOAD_FAILED, 0)


def test_those_who_waited_for_the_same_load_report_it_too() -> None:
    engine = StoreEngine(saves="used", late=3)
    serve(engine, 1, PROMPT)
    engine.forget()
    engine.add(2, PROMPT)
    engine.add(3, [*PROMPT[:8], 1, 2, 3])
    engine.run()
    reports = [engine.firsts[request_id].prefix for request_id in (2, 3)]
    assert [(report.device, report.ram) for report in reports] == [(0, 16), (0, 8)]


def test_what_is_not_worth_loading() -> None:
    engine = StoreEngine(saves="used")
    engine.step_seconds = 1.8
    serve(engine, 1, PROMPT)
    engine.forget()
    engine.store.seconds_each = 100.0
    assert why(serve(engine, 2, PROMPT)) == (MissReason.NOT_LOADED, 0)


@given(
    found=st.integers(0, 17),
    num_found=st.integers(0, 4).map(lambda blocks: blocks * BS),
    counts=st.tuples(*[st.integers(0, 9)] * 3),
)
def test_the_sources_add_up_whatever_a_load_says(found, num_found, counts) -> None:
    sources = dict(zip(("ram", "disk", "peer"), counts, strict=True))
    report = report_load(found, Loaded(num_found, sources, True, late=False))
    assert report.cached == found and report.cached + report.computed == len(PROMPT)
    assert min(report.device, report.ram, report.disk, report.peer) >= 0


FEW = st.lists(st.integers(0, 1), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            FEW,
            st.sampled_from([None, "a", "b"]),
            st.sampled_from([None, "x@1"]),
            st.sampled_from([{}, {}, {"prompt_logprobs": 1, "first_prompt_logprob": 5},
                             {"reads_prefix_cache": False}, {"max_tokens": 5}]),
            st.sampled_from(["run", "run", "wait", "reset"]),
        ),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(10, 30),
    windows=st.sampled_from([(None,), (None, 5), (4,)]),
)  # fmt: skip
def test_reports_of_random_lives(requests, num_blocks, windows) -> None:
    """The counts add up to the prompt. A reason is only given where it can be true."""
    engine = Engine(num_blocks=num_blocks + 16 * (len(windows) - 1), windows=windows)
    asked: dict[int, tuple[list[int], Placement]] = {}
    updates = []
    was_reset = False
    for prompt, salt, adapter, fields, then in requests:
        place = Placement(cache_salt=salt, adapter=adapter)
        asked[engine.add(prompt, placement=place, **fields)] = (prompt, place)
        if then != "wait":
            updates += engine.updates()
        if then == "reset":
            engine.reset()
            was_reset = True
    updates += engine.updates()
    reports = {update.request_id: update.prefix for update in updates if update.prefix}
    assert reports.keys() == asked.keys()
    for request_id, (prompt, place) in asked.items():
        report = reports[request_id]
        found, size = report.cached, len(prompt)
        assert report.external == 0 and found + report.computed == size
        end = (found // BS + 1) * BS
        same = [
            other
            for other in asked.values()
            if other[1] == place and other[0][:end] == prompt[:end]
        ]
        elsewhere = [
            other[1].cache_salt for other in asked.values()
            if other[1] != place and other[0][:end] == prompt[:end]
        ]  # fmt: skip
        match report.reason:
            case MissReason.WHOLE:
                assert found == size - 1
            case MissReason.BOUNDARY:
                assert found < size - 1 and end >= size
            case MissReason.EVICTED:
                assert len(same) > 1 and report.seconds_ago >= 0.0
            case MissReason.RESET:
                assert was_reset and len(same) > 1
            case MissReason.ADAPTER:
                assert place.cache_salt in elsewhere
            case MissReason.SALT:
                assert set(elsewhere) - {place.cache_salt}
            case MissReason.CAPPED | MissReason.UNSEEN:
                assert end <= size or report.reason is MissReason.CAPPED
            case other:
                raise AssertionError(other)


def test_an_eviction_is_recorded_once_the_last_group_has_lost_it() -> None:
    pool, record = BlockPool(4, num_groups=2), Evictions()
    pool.observers = (record,)
    blocks = pool.allocate(2)
    pool.register(blocks, b"h", CacheKey(), (1, 2), 1)
    pool.release(blocks)
    pool.allocate(2)
    assert record.find(b"h") is None
    pool.allocate(1)
    assert record.find(b"h") == (MissReason.EVICTED, (0, 0.0))

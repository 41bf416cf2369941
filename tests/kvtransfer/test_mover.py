"""Saves are snapshots, loads end in time, and what comes late is never written."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from quire.kvtransfer.base import BlockBytes, Snapshot
from quire.kvtransfer.mover import Mover, Threads
from quire.messages import BlockName, KVSource, Save, StepPlan, Transfer, TransferResult
from tests.kvtransfer.memory import BLOCK_BYTES, Cache, DictPeers, DictTier, bytes_of, name_of

SOURCE = KVSource(engine_id="p", host="127.0.0.1", ports=(1,), ticket="t", num_tokens=64)
SECONDS = 20.0
Make = Callable[..., Mover]


@pytest.fixture
def cache() -> Cache:
    return Cache(64)


@pytest.fixture
def make(cache: Cache) -> Iterator[Make]:
    movers: list[Mover] = []

    def make_mover(*tiers: DictTier, **options: object) -> Mover:
        movers.append(Mover(cache, tiers, **options))  # type: ignore[arg-type]
        return movers[-1]

    yield make_mover
    for mover in movers:
        mover.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("kv ")]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def done(transfer_id: int, *, late: bool = False, **sources: int) -> TransferResult:
    """A result: its good blocks by where they were."""
    return TransferResult(
        transfer_id=transfer_id, num_good=sum(sources.values()), sources=sources, late=late
    )


def collected(mover: Mover, count: int = 1) -> list[TransferResult]:
    results: list[TransferResult] = []
    until(lambda: len(results.extend(mover.collect(0.002)) or results) >= count)
    return sorted(results, key=lambda each: each.transfer_id)


def plan(
    *,
    saves: Sequence[Save] = (),
    loads: Sequence[Transfer] = (),
) -> StepPlan:
    return StepPlan(step_id=1, saves=list(saves), loads=list(loads))


def start(mover: Mover, plan: StepPlan) -> None:
    mover.save(plan)
    mover.load(plan.loads)


def save(numbers: Sequence[int], block_ids: Sequence[int], ticket: str | None = None) -> Save:
    return Save(names=[name_of(n) for n in numbers], block_ids=list(block_ids), ticket=ticket)


def load(
    numbers: Sequence[int],
    block_ids: Sequence[int],
    *,
    transfer_id: int = 1,
    timeout: float = 60.0,
    source: KVSource | None = None,
) -> Transfer:
    names = [name_of(n) for n in numbers]
    return Transfer(
        transfer_id=transfer_id,
        names=names,
        block_ids=list(block_ids),
        timeout=timeout,
        source=source,
    )


def holds(cache: Cache, numbers: Sequence[int], block_ids: Sequence[int]) -> bool:
    return all(
        (cache.blocks[block] == bytes_of(name_of(number))).all()
        for number, block in zip(numbers, block_ids, strict=True)
    )


def fill(cache: Cache, numbers: Sequence[int], block_ids: Sequence[int]) -> None:
    for number, block in zip(numbers, block_ids, strict=True):
        cache.blocks[block] = bytes_of(name_of(number))


def test_a_save_is_what_the_cache_was_when_the_plan_started(make: Make, cache: Cache) -> None:
    tier = DictTier()
    mover = make(tier)
    fill(cache, [1, 2, 3], [5, 6, 7])
    start(mover, plan(saves=[save([1, 2], [5, 6]), save([3], [7])]))
    cache.blocks[:] = 0
    assert all(mover.has(name_of(n)) for n in (1, 2, 3))  # at once
    until(lambda: len(tier.blocks) == 3)
    for number in (1, 2, 3):
        assert (tier.blocks[name_of(number)] == bytes_of(name_of(number))).all()
    assert not mover.has(name_of(4))


def test_loads_find_what_is_staged_and_what_is_in_any_tier(make: Make, cache: Cache) -> None:
    ram, disk = DictTier(), DictTier("disk")
    gate = threading.Event()
    ram.gate = lambda kind: gate.wait(SECONDS) if kind == "put" else None  # type: ignore[assignment]
    disk.put(name_of(2), bytes_of(name_of(2)))
    mover = make(ram, disk)
    ram.blocks[name_of(3)] = bytes_of(name_of(3))
    fill(cache, [1], [5])
    start(mover, plan(saves=[save([1], [5])], loads=[load([1, 2, 3, 4], [5, 6, 7, 8])]))
    assert collected(mover) == [done(1, ram=2, disk=1)]
    assert holds(cache, [1, 2, 3], [5, 6, 7])
    assert mover.counts["loaded staging"] == mover.counts["loaded disk"] == 1
    assert not mover.collect() and not mover.is_loading
    gate.set()


def test_a_load_stops_at_the_first_name_that_nobody_has(make: Make, cache: Cache) -> None:
    tier = DictTier()
    for number in (1, 3):
        tier.put(name_of(number), bytes_of(name_of(number)))
    mover = make(tier)
    start(mover, plan(loads=[load([1, 2, 3], [5, 6, 7])]))
    assert collected(mover)[0].num_good == 1
    assert not cache.blocks[6:8].any()


def test_a_peer_is_asked_for_what_is_not_here(make: Make, cache: Cache) -> None:
    tier, peers = DictTier(), DictPeers([name_of(n) for n in (2, 3, 5, 6)])
    for number in (1, 4):
        tier.put(name_of(number), bytes_of(name_of(number)))
    mover = make(tier, peers=peers)
    start(mover, plan(loads=[load(range(1, 9), range(11, 19), source=SOURCE)]))
    assert collected(mover) == [done(1, ram=2, peer=4)]
    assert holds(cache, range(1, 7), range(11, 17))
    asked = [[int.from_bytes(digest, "big") for digest, _ in names] for names in peers.asked]
    assert asked == [[2, 3], [5, 6, 7, 8], [7, 8]]
    assert peers.ended == ["t"]


def test_what_is_damaged_here_is_fetched(make: Make, cache: Cache) -> None:
    tier, peers = DictTier(), DictPeers([name_of(1)])
    tier.has = lambda name: True  # type: ignore[method-assign]
    mover = make(tier, peers=peers)
    start(mover, plan(loads=[load([1], [5], source=SOURCE)]))
    assert collected(mover)[0].num_good == 1 and holds(cache, [1], [5])


@pytest.mark.parametrize("where", ["tier", "peer"])
def test_a_read_that_hangs_is_reported_in_time_and_never_written(
    make: Make, cache: Cache, where: str
) -> None:
    now, gate = [0.0], threading.Event()
    tier, peers = DictTier(), DictPeers([name_of(n) for n in range(9)])
    peers.gate = gate
    if where == "tier":
        tier.blocks = {name_of(n): bytes_of(name_of(n)) for n in range(9)}
        tier.gate = lambda kind: gate.wait(SECONDS)  # type: ignore[assignment, return-value]
    mover = make(tier, peers=peers, clock=lambda: now[0])
    start(mover, plan(loads=[load([1, 2], [5, 6], timeout=3.0, source=SOURCE)]))
    assert mover.collect(0.002) == []
    now[0] = 3.0
    assert mover.collect() == [done(1, late=True)]
    gate.set()
    # The thread goes on with this load, after it has dropped the late one.
    tier.gate, peers.gate = None, None
    start(mover, plan(loads=[load([3], [7], transfer_id=2, source=SOURCE)]))
    assert collected(mover) == [done(2, **{"ram" if where == "tier" else "peer": 1})]
    assert not cache.blocks[5:7].any() and peers.ended == ["t", "t"]


def test_other_loads_do_not_wait_for_a_peer_that_hangs(make: Make, cache: Cache) -> None:
    tier, peers = DictTier(), DictPeers([])
    peers.gate = threading.Event()
    tier.put(name_of(2), bytes_of(name_of(2)))
    mover = make(tier, peers=peers)
    slow, fast = load([1], [5], source=SOURCE), load([2], [6], transfer_id=2)
    start(mover, plan(loads=[slow, fast]))
    assert collected(mover) == [done(2, ram=1)]
    assert mover.is_loading


def test_saves_are_dropped_when_staging_is_full(make: Make, cache: Cache) -> None:
    tier, gate = DictTier(), threading.Event()
    tier.gate = lambda kind: gate.wait(SECONDS)  # type: ignore[assignment, return-value]
    mover = make(tier, staging_bytes=2 * BLOCK_BYTES)
    fill(cache, range(5), range(5))
    start(mover, plan(saves=[save(range(5), range(5))]))
    assert mover.counts["dropped"] == 3
    assert [mover.has(name_of(n)) for n in range(5)] == [True, True, False, False, False]
    gate.set()
    until(lambda: len(tier.blocks) == 2)
    until(lambda: mover.counts["saved"] == 2)
    start(mover, plan(saves=[save(range(2, 4), range(2, 4))]))
    until(lambda: len(tier.blocks) == 4)


def test_nothing_from_before_a_clear_is_found_after_it(make: Make, cache: Cache) -> None:
    tier, reached, gate = DictTier(), threading.Event(), threading.Event()

    def wait(kind: str) -> None:
        reached.set()
        gate.wait(SECONDS)

    tier.gate = wait
    mover = make(tier)
    fill(cache, range(4), range(4))
    start(mover, plan(saves=[save(range(4), range(4))]))
    reached.wait(SECONDS)  # one is in a put
    start(mover, plan(loads=[load([1], [9], transfer_id=3)]))
    threading.Timer(0.02, gate.set).start()
    mover.clear()
    assert not any(mover.has(name_of(n)) for n in range(4))
    assert mover.collect() == [TransferResult(transfer_id=3, num_good=0)]
    start(mover, plan(saves=[save([7], [7])]))
    until(lambda: list(tier.blocks) == [name_of(7)])


class Held:
    """`Exports` for one ticket."""

    def __init__(self) -> None:
        self.rows = np.zeros((2, BLOCK_BYTES), dtype=np.uint8)
        self.snapshots: list[Snapshot] = []

    def reserve(self, ticket: str, names: Sequence[BlockName]) -> Sequence[BlockBytes] | None:
        return list(self.rows) if ticket == "good" else None

    def ready(self, ticket: str, snapshot: Snapshot) -> None:
        assert ticket == "good"
        self.snapshots.append(snapshot)

    def clear(self) -> None:
        self.rows[:] = 0

    def close(self) -> None:
        pass


def test_saves_with_a_ticket_go_to_the_exports_or_fail(make: Make, cache: Cache) -> None:
    exports = Held()
    mover = make(exports=exports)
    fill(cache, [1, 2], [5, 6])
    saves = [save([1, 2], [5, 6], "good"), save([1, 2], [5, 6], "no room")]
    start(mover, plan(saves=saves))
    (snapshot,) = exports.snapshots
    snapshot.wait()
    assert (exports.rows[1] == bytes_of(name_of(2))).all() and not mover.has(name_of(1))


def test_closing_does_not_wait_for_what_hangs(make: Make, cache: Cache) -> None:
    tier, gate = DictTier(), threading.Event()
    tier.put(name_of(1), bytes_of(name_of(1)))
    tier.gate = lambda kind: gate.wait(SECONDS)  # type: ignore[assignment, return-value]
    mover = make(tier)
    start(mover, plan(loads=[load([1], [5])]))
    mover.close()
    mover.close()
    assert tier.closed
    gate.set()
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("kv ")])
    assert not cache.blocks[5].any()


def test_closing_may_flush(make: Make, cache: Cache) -> None:
    tier = DictTier("disk")
    tier.gate = lambda kind: time.sleep(0.01)
    mover = make(tier, flush_seconds=SECONDS)
    fill(cache, range(6), range(6))
    for number in range(6):
        start(mover, plan(saves=[save([number], [number])]))
    mover.close()
    assert len(tier.blocks) == 6


def test_chunks_longer_than_a_load_and_shorter(make: Make) -> None:
    big = Cache(40, 300_000)  # three blocks a chunk
    tier = DictTier()
    for number in range(10):
        tier.put(name_of(number), bytes_of(name_of(number), 300_000))
    mover = Mover(big, [tier])
    start(mover, plan(loads=[load(range(10), range(20, 30))]))
    assert collected(mover)[0].num_good == 10
    for number in range(10):
        assert (big.blocks[20 + number] == bytes_of(name_of(number), 300_000)).all()
    mover.close()


def test_the_time_of_a_block_is_measured_for_tiers_and_for_peers(make: Make, cache: Cache) -> None:
    now = [0.0]
    tier, peers = DictTier(), DictPeers([name_of(n) for n in range(8)])
    tier.blocks = {name_of(n): bytes_of(name_of(n)) for n in range(4)}
    mover = make(tier, peers=peers, clock=lambda: now[0])
    tier.gate = lambda kind: now.__setitem__(0, now[0] + 0.5)
    assert mover.seconds(8, from_peer=False) == 0.0
    start(mover, plan(loads=[load(range(4), range(4))]))
    collected(mover)
    assert mover.seconds(8, from_peer=False) == pytest.approx(4.0)
    assert mover.seconds(8, from_peer=True) == 0.0
    now[0] += 31
    assert mover.seconds(8, from_peer=False) == 0.0  # it is tried again
    start(mover, plan(loads=[load([4], [4], transfer_id=2, source=SOURCE)]))
    collected(mover)
    assert mover.seconds(1, from_peer=True) > 0 and mover.counts["loaded peer"] == 1


def test_nothing_is_copied_for_tiers_that_are_off(make: Make, cache: Cache) -> None:
    ram, disk = DictTier(), DictTier("disk")
    mover = make(disk)
    disk.is_on = False
    assert not mover.wants(name_of(1))
    start(mover, plan(saves=[save([1], [1])]))
    assert not mover.has(name_of(1)) and not mover.counts
    both = make(disk, ram)
    assert both.wants(name_of(1))
    ram.put(name_of(1), bytes_of(name_of(1)))
    assert not both.wants(name_of(1))
    assert not make().wants(name_of(1))


class Slow:
    """A `Snapshot` that takes until it is let go, as a device's."""

    def __init__(self, fill: Callable[[], None]) -> None:
        self.gate, self.waited, self._fill = threading.Event(), threading.Event(), fill

    def wait(self) -> None:
        self.waited.set()
        assert self.gate.wait(SECONDS)
        self._fill()


class SlowCache(Cache):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.snapshots: list[Slow] = []

    def read(
        self, block_ids: Sequence[int], groups: Sequence[int], out: Sequence[BlockBytes]
    ) -> Slow:  # type: ignore[override]
        blocks = self.blocks[list(block_ids)]

        def fill() -> None:
            for row, block in zip(out, blocks, strict=True):
                row[:] = block

        self.snapshots.append(Slow(fill))
        return self.snapshots[-1]


def test_no_plan_waits_for_a_copy_that_a_load_waits_for() -> None:
    cache, tier = SlowCache(16), DictTier()
    mover = Mover(cache, [tier])
    fill(cache, [1, 2], [1, 2])
    start(mover, plan(saves=[save([1], [1])], loads=[load([1], [9])]))
    until(lambda: cache.snapshots[0].waited.is_set())
    time.sleep(0.05)  # both threads are in it
    start(mover, plan(saves=[save([2], [2])]))
    cache.blocks[1:3] = 0
    for snapshot in cache.snapshots:
        snapshot.gate.set()
    assert collected(mover)[0].num_good == 1 and holds(cache, [1], [9])
    until(lambda: len(tier.blocks) == 2)
    assert all((tier.blocks[name_of(n)] == bytes_of(name_of(n))).all() for n in (1, 2))
    mover.close()


def test_a_put_that_raises_leaves_nothing_staged(make: Make, cache: Cache) -> None:
    tier, failures = DictTier(), [MemoryError()]

    def fail(kind: str) -> None:
        if failures:
            raise failures.pop()

    tier.gate = fail
    mover = make(tier, staging_bytes=3 * BLOCK_BYTES)
    fill(cache, range(6), range(6))
    for first in (0, 3):
        start(mover, plan(saves=[save(range(first, first + 3), range(first, first + 3))]))
        until(lambda: not len(mover._staging))
    assert set(tier.blocks) == {name_of(n) for n in (3, 4, 5)} and not mover.counts["dropped"]


def test_the_time_of_a_load_that_hung_counts(make: Make, cache: Cache) -> None:
    now, gate = [0.0], threading.Event()
    tier, peers = DictTier(), DictPeers([])
    tier.gate = lambda kind: gate.wait(SECONDS)  # type: ignore[assignment, return-value]
    mover = make(tier, peers=peers, clock=lambda: now[0])
    start(mover, plan(loads=[load([1, 2], [5, 6], timeout=3.0)]))
    now[0] = 3.0
    assert mover.collect() == [done(1, late=True)]
    assert mover.seconds(2, from_peer=False) == pytest.approx(3.0)
    gate.set()


def test_threads_survive_what_is_added_while_they_are_closed() -> None:
    for _ in range(50):
        threads, ran = Threads("kv test", nice=0, most=2), Counter[str]()
        for _ in range(20):
            threads.add(lambda: ran.update(["call"]))  # noqa: B023
        threads.close(0.0)
        count = ran["call"]
        threads.add(lambda: ran.update(["late"]))  # noqa: B023
        threads.close(0.0)
        assert ran == Counter({"call": count} if count else {})
    assert not [each for each in threading.enumerate() if each.name.startswith("kv ")]

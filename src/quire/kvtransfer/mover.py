"""A rank's store: it moves blocks between the cache and tiers or peers, in threads beside the steps.

Saves. When a plan starts, its blocks are copied to *staging*, host memory of bounded size. From then on the
plan may overwrite them, and a load finds them. A thread puts them into the tiers. If staging is full, saves
are dropped, so a slow tier costs no step anything.

Loads. A thread looks for the names in staging and in the tiers, in this order, and asks a peer for those that
are not here. It writes the blocks in chunks, each under the load's lock and only while the load is not over.
A load is over when it is reported, after its timeout at the latest, even if a read hangs: what comes late is
never written. Reads from peers have threads of their own, since they may take long.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.config.kv import STAGING_BYTES
from quire.kvtransfer.base import BlockBytes, Closable, Exports, KVMemory, Peers, Snapshot, Tier
from quire.messages import (
    BlockName,
    KVSource,
    Save,
    StepPlan,
    TierChange,
    TierStats,
    Transfer,
    TransferResult,
)  # fmt: skip

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Written to the cache at a time."""
SAVE_NICE, LOAD_NICE = 19, 5
"""Added to the threads' nice values: a request waits for a load, nobody for a save. With 10, write-through
cost 3 % of the throughput of 64 requests on two cores, with 19 1 to 2 %."""
MOST_FETCHES = 4
"""Loads that ask peers at the same time."""
MEASURED_LOADS, MEASURED_SECONDS = 9, 30.0
"""The time for a block is the median of so many last loads, and an older one does not count: if loading seems
slow, it is tried again after a while."""
CLOSE_SECONDS = 0.5
"""Until a thread that does not end is left alone."""


class Threads:
    """Daemon threads that carry out calls in order. They start when there is something to do."""

    def __init__(self, name: str, *, nice: int, most: int = 1) -> None:
        self._name, self._nice, self._most = name, nice, most
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._closing = False

    def add(self, call: Callable[[], None]) -> None:
        with self._changed:
            if self._closing:
                return
            self._calls.append(call)
            if self._num_idle >= len(self._calls):
                self._changed.notify()
            elif len(self._threads) < self._most:
                name = f"{self._name} {len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self, seconds: float) -> None:
        """Carry out what was added, for at most so long. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until = time.monotonic() + seconds
        while self._calls and time.monotonic() < until and self._threads:
            time.sleep(0.001)
        with self._changed:
            self._calls.clear()
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.nice(self._nice)  # on Linux, of this thread alone
        while True:
            with self._changed:
                while not self._calls:
                    if self._closing:
                        return
                    self._num_idle += 1
                    self._changed.wait()
                    self._num_idle -= 1
                call = self._calls.popleft()
            try:
                call()
            except Exception:
                logger.exception("a transfer of KV failed")


@dataclass(slots=True, eq=False)
class _Staged:
    row: int
    snapshot: Snapshot | None = None


class Staging:
    """Blocks that are on their way to the tiers."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.rows = np.empty((num_blocks, block_bytes), dtype=np.uint8)
        """Takes memory as it is used."""
        self._free = list(range(num_blocks))
        self._staged: dict[BlockName, _Staged] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: BlockName) -> bool:
        return name in self._staged

    def __len__(self) -> int:
        return len(self._staged)

    def add(self, name: BlockName) -> _Staged | None:
        """None: it is full. The caller fills the row before anyone else is told of the name."""
        with self._lock:
            if not self._free:
                return None
            staged = self._staged[name] = _Staged(self._free.pop())
            return staged

    def holds(self, name: BlockName, staged: _Staged) -> bool:
        return self._staged.get(name) is staged

    def get(self, name: BlockName, out: BlockBytes) -> bool:
        staged = self._staged.get(name)
        if staged is None or staged.snapshot is None:
            return False
        staged.snapshot.wait()
        with self._lock:
            if not self.holds(name, staged):
                return False  # it is in a tier by now, or was dropped
            out[:] = self.rows[staged.row]
            return True

    def remove(self, name: BlockName, staged: _Staged) -> None:
        with self._lock:
            if self.holds(name, staged):
                del self._staged[name]
                self._free.append(staged.row)

    def clear(self) -> None:
        for staged in list(self._staged.values()):
            if staged.snapshot is not None:
                staged.snapshot.wait()  # or a `get` might still fill the row when it is another's
        with self._lock:
            self._free += [staged.row for staged in self._staged.values()]
            self._staged.clear()


@dataclass(slots=True)
class _Load:
    transfer: Transfer
    deadline: float
    mark: object
    began: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    good: int = 0
    """The number of its leading blocks that are in the cache."""
    over: bool = False
    from_peer: bool = False
    sources: Counter[str] = field(default_factory=Counter)
    """Of its good blocks, as in `TransferResult`."""


class Mover:
    """A `Store`. What changes it is called by the thread that launches plans."""

    def __init__(
        self,
        memory: KVMemory,
        tiers: Sequence[Tier],
        *,
        peers: Peers | None = None,
        exports: Exports | None = None,
        server: Closable | None = None,
        staging_bytes: int = STAGING_BYTES,
        flush_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """tiers: in the order in which they are asked. server: gives others what `exports` has. All of these
        are closed with this object.
        flush_seconds: what closing may take to put what is staged into the tiers."""
        self._memory, self.tiers = memory, tuple(tiers)
        self._peers, self._exports, self._server = peers, exports, server
        self._clock, self.flush_seconds = clock, flush_seconds
        size = memory.block_bytes
        self._staging = Staging(max(1, staging_bytes // size) if tiers else 0, size)
        self._chunk = max(1, CHUNK_BYTES // size)
        self._buffers = threading.local()
        self._putting = threading.Lock()
        """Held during a put, so that none outlasts `clear`."""
        self._changes: deque[TierChange] | None = None
        self._saving = Threads("kv saves", nice=SAVE_NICE)
        self._loading = Threads("kv loads", nice=LOAD_NICE)
        self._fetching = Threads("kv fetches", nice=LOAD_NICE, most=MOST_FETCHES)
        self._under_way: dict[int, _Load] = {}
        """Until their results are collected."""
        self._results: list[TransferResult] = []
        self._changed = threading.Condition()
        self._measured: tuple[deque[tuple[float, float]], ...] = (
            deque(maxlen=MEASURED_LOADS),
            deque(maxlen=MEASURED_LOADS),
        )
        """Of loads in which no peer was asked, and of those with one: when they ended, and the time from the
        plan's start to the end for each block."""
        self.counts: Counter[str] = Counter()
        """Blocks: "saved", "dropped" because staging was full, and "loaded" from "staging", a tier's label or
        "peer", as "loaded ram"."""

    @property
    def is_loading(self) -> bool:
        """Whether there are loads whose results have not been collected."""
        return bool(self._under_way)

    def has(self, name: BlockName) -> bool:
        """As `Store.has`."""
        return name in self._staging or any(tier.has(name) for tier in self.tiers)

    def wants(self, name: BlockName) -> bool:
        """As `Store.wants`."""
        first = next((tier for tier in self.tiers if tier.is_on), None)
        return first is not None and name not in self._staging and not first.has(name)

    def seconds(self, num_blocks: int, *, from_peer: bool) -> float:
        """As `Store.seconds`."""
        since = self._clock() - MEASURED_SECONDS
        found = [each for ended, each in list(self._measured[from_peer]) if ended >= since]
        return num_blocks * statistics.median(found) if found else 0.0

    def expect(self, source: KVSource) -> None:
        """As `Store.expect`."""
        if self._peers is not None:
            self._peers.hold(source)

    def release(self, source: KVSource) -> None:
        """As `Store.release`."""
        if self._peers is not None:
            self._peers.release(source)

    def issue(self, names: Sequence[BlockName]) -> str | None:
        """As `Store.issue`."""
        return None if self._exports is None else self._exports.issue(names)

    def totals(self) -> dict[str, TierStats]:
        """As `Store.totals`."""
        size, counts = self._memory.block_bytes, self.counts
        found = {
            tier.label: TierStats(
                blocks=len(tier), bytes=tier.num_bytes, capacity_bytes=tier.capacity,
                is_off=not tier.is_on, **tier.counts,
            )
            for tier in self.tiers
        }  # fmt: skip
        if self.tiers:
            found["staging"] = TierStats(
                blocks=len(self._staging),
                bytes=len(self._staging) * size,
                capacity_bytes=len(self._staging.rows) * size,
                loaded_blocks=counts["loaded staging"],
                dropped_blocks=counts["dropped"],
            )
        if self._peers is not None:
            loaded = counts["loaded peer"]
            found["peer"] = TierStats(loaded_blocks=loaded, read_bytes=loaded * size)
        if self._exports is not None:
            found["export"] = TierStats(bytes=self._exports.used_bytes)
        return found

    def changes(self) -> list[TierChange]:
        """As `Store.changes`."""
        if self._changes is None:
            self._changes = deque()
            for tier in self.tiers:
                tier.note = functools.partial(self._note, tier.label)
        return [self._changes.popleft() for _ in range(len(self._changes))]

    def save(self, plan: StepPlan) -> None:
        """Begin the plan's saves, before it writes anything."""
        if plan.clears_stores:
            self.clear()
        for save in plan.saves:
            if save.ticket is None:
                self._save(save)
            elif self._exports is not None:
                rows = self._exports.reserve(save.ticket, save.names)
                if rows is not None:
                    self._exports.ready(save.ticket, self._read(save.names, save.block_ids, rows))

    def load(self, transfers: Sequence[Transfer]) -> None:
        """Begin a plan's loads, after its copies."""
        if not transfers:
            return
        mark, now = self._memory.mark(), self._clock()
        for transfer in transfers:
            load = _Load(transfer, now + transfer.timeout, mark, now)
            self._under_way[transfer.transfer_id] = load
            self._loading.add(lambda load=load: self._load(load, fetches=False))  # type: ignore[misc]

    def collect(self, wait: float = 0.0) -> list[TransferResult]:
        """Results of loads that are over. wait: seconds, if none is over and some are under way."""
        if not self._under_way:
            return []
        now = self._clock()
        for load in self._under_way.values():
            if now >= load.deadline:
                self._end(load)
        with self._changed:
            if wait and not self._results:
                self._changed.wait(wait)
            results, self._results = self._results, []
        for result in results:
            del self._under_way[result.transfer_id]
        return results

    def clear(self) -> None:
        """Forget everything. Loads under way end with no good block."""
        for load in self._under_way.values():
            self._end(load)
        with self._changed:
            self._results = [
                TransferResult(transfer_id=each.transfer_id, num_good=0) for each in self._results
            ]
        with self._putting:
            self._staging.clear()
            for tier in self.tiers:
                tier.clear()
            if self._changes is not None:
                self._changes.clear()
        if self._exports is not None:
            self._exports.clear()

    def close(self) -> None:
        """Nothing is written to the cache any more. Idempotent."""
        for load in self._under_way.values():
            self._end(load)
        for each in (self._peers, self._server, self._exports):
            if each is not None:
                each.close()
        self._saving.close(self.flush_seconds)
        self._loading.close(0.0)
        self._fetching.close(0.0)
        for tier in self.tiers:
            tier.close()
        self._under_way.clear()

    def _note(self, tier: str, name: BlockName, stored: bool) -> None:
        assert self._changes is not None
        self._changes.append(TierChange(tier, name, stored))

    # --- saves ----------------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        names, block_ids, entries = [], [], []
        for name, block_id in zip(save.names, save.block_ids, strict=True):
            if not self.wants(name):
                continue
            staged = self._staging.add(name)
            if staged is None:
                self.counts["dropped"] += 1
                continue
            names.append(name)
            block_ids.append(block_id)
            entries.append(staged)
        if not names:
            return
        snapshot = self._read(names, block_ids, [self._staging.rows[each.row] for each in entries])
        for staged in entries:
            staged.snapshot = snapshot
        self._saving.add(lambda: self._put(list(zip(names, entries, strict=True)), snapshot))

    def _read(
        self, names: Sequence[BlockName], block_ids: Sequence[int], rows: Sequence[BlockBytes]
    ) -> Snapshot:
        return self._memory.read(block_ids, [group for _, group in names], rows)

    def _put(self, entries: Sequence[tuple[BlockName, _Staged]], snapshot: Snapshot) -> None:
        try:
            for name, staged in entries:
                with self._putting:
                    if not self._staging.holds(name, staged):
                        continue  # cleared
                    snapshot.wait()
                    row = self._staging.rows[staged.row]
                    kept = [tier.put(name, row) for tier in self.tiers]
                self.counts["saved"] += any(kept)
                self._staging.remove(name, staged)
        finally:
            for name, staged in entries:
                self._staging.remove(name, staged)

    # --- loads ----------------------------------------------------------------------------------------

    def _load(self, load: _Load, *, fetches: bool) -> None:
        try:
            if self._moves(load, fetches):
                self._fetching.add(lambda: self._load(load, fetches=True))
                return
        except Exception:
            logger.exception("a load of KV failed")
        self._end(load)

    def _moves(self, load: _Load, fetches: bool) -> bool:
        """Load as far as it goes. Returns whether it goes on with a fetch, if this thread does none."""
        names, source = load.transfer.names, load.transfer.source
        buffer = self._buffer()
        while load.good < len(names) and not load.over:
            wanted = names[load.good : load.good + self._chunk]
            origins = self._gather(wanted, buffer)
            count = len(origins)
            if not count:
                if source is None or self._peers is None:
                    return False
                if not fetches:
                    return True
                run = next((i for i in range(1, len(wanted)) if self.has(wanted[i])), len(wanted))
                left = load.deadline - self._clock()
                load.from_peer = True
                count = self._peers.fetch(source, wanted[:run], buffer[:run], left)
                origins = ["peer"] * count
            if not count or not self._write(load, buffer[:count], origins):
                return False
            with self._changed:
                self.counts.update(f"loaded {origin}" for origin in origins)
        return False

    def _gather(self, names: Sequence[BlockName], out: NDArray[np.uint8]) -> list[str]:
        """Leading names that are here, with where they were found."""
        origins = []
        for name, row in zip(names, out, strict=False):
            if self._staging.get(name, row):
                origins.append("staging")
                continue
            found = next((tier.label for tier in self.tiers if tier.get(name, row)), None)
            if found is None:
                break
            origins.append(found)
        return origins

    def _write(self, load: _Load, data: NDArray[np.uint8], origins: Sequence[str]) -> bool:
        """False: it is too late."""
        with load.lock:
            if load.over or self._clock() >= load.deadline:
                return False
            block_ids = load.transfer.block_ids[load.good : load.good + len(data)]
            self._memory.write(block_ids, data, load.mark)
            load.good += len(data)
            load.sources.update("ram" if origin == "staging" else origin for origin in origins)
        return True

    def _end(self, load: _Load) -> None:
        transfer, now = load.transfer, self._clock()
        with load.lock:
            if load.over:
                return
            load.over = True
            late = load.good < len(transfer.names) and now >= load.deadline
            result = TransferResult(
                transfer_id=transfer.transfer_id,
                num_good=load.good,
                sources=dict(load.sources),
                late=late,
            )
            with self._changed:
                if load.good or late:  # what hangs takes at least so long
                    each = (now - load.began) / (load.good or len(transfer.names))
                    self._measured[load.from_peer].append((now, each))
                self._results.append(result)
                self._changed.notify_all()
        if self._peers is not None and load.transfer.source is not None:
            self._peers.done(load.transfer.source)

    def _buffer(self) -> NDArray[np.uint8]:
        """[chunk, block_bytes], of this thread."""
        found: NDArray[np.uint8] | None = getattr(self._buffers, "rows", None)
        if found is None:
            found = np.empty((self._chunk, self._memory.block_bytes), dtype=np.uint8)
            self._buffers.rows = found
        return found

"""What the scheduler asks about KV outside the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from quire.kvtransfer.base import Store
from quire.messages import BlockName, KVSource, TierChange, TierStats

COUNTS = (
    "saved_blocks", "loaded_blocks", "evicted_blocks", "dropped_blocks", "damaged_blocks",
    "written_bytes", "read_bytes",
)  # fmt: skip
"""The fields of `TierStats` that only rise; the others are a state."""
LEAST_HITS = 1
"""With write_through_selective: the requests that must have found a block in the cache before it is saved."""


class StoreConnector:
    """A `KVConnector` that asks the store of the sampling rank. The other ranks' stores are given the same
    plans, so they have the same blocks; where they differ, a load gets fewer.

    policy: when blocks are saved (`KVTiersConfig.kv_write_policy`); None: there are no tiers. fetches:
    whether KV is read from other instances. held_at: this instance as others reach it, without a ticket;
    None: no KV is held for them.
    """

    def __init__(
        self,
        store: Callable[[], Store | None],
        *,
        block_size: int,
        policy: str | None,
        fetches: bool = False,
        held_at: KVSource | None = None,
    ) -> None:
        self._store = store
        self._block_size = block_size
        self._saves_evicted = policy in ("write_back", "write_through")
        self._least_hits = {"write_through": 0, "write_through_selective": LEAST_HITS}.get(
            policy or ""
        )
        """None: nothing is saved while it is in the cache."""
        self._fetches, self._held_at = fetches, held_at
        self._reported: tuple[Store | None, dict[str, TierStats]] = (None, {})
        """The store that was asked last, and its totals then."""

    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        there = 0
        if source is not None and self._fetches:
            there = min(len(names), max(0, source.num_tokens // self._block_size - start))
        store = self._store()
        if store is not None:
            while there < len(names) and store.has(names[there]):
                there += 1
        return there

    def seconds(self, num_blocks: int, source: KVSource | None = None) -> float:
        store = self._store()
        return 0.0 if store is None else store.seconds(num_blocks, from_peer=source is not None)

    def wants_evicted(self, name: BlockName) -> bool:
        return self._saves_evicted and self._wants(name)

    def wants_reused(self, name: BlockName, hits: int) -> bool:
        return self._least_hits is not None and hits >= self._least_hits and self._wants(name)

    def expect(self, source: KVSource) -> None:
        if (store := self._store()) is not None:
            store.expect(source)

    def release(self, source: KVSource) -> None:
        if (store := self._store()) is not None:
            store.release(source)

    def hold(self, names: Sequence[BlockName], num_tokens: int) -> KVSource | None:
        store = self._store()
        if store is None or self._held_at is None or (ticket := store.issue(names)) is None:
            return None
        return msgspec.structs.replace(self._held_at, ticket=ticket, num_tokens=num_tokens)

    def stats(self) -> dict[str, TierStats]:
        store = self._store()
        totals = {} if store is None else store.totals()
        before = self._reported[1] if self._reported[0] is store else {}
        self._reported = store, totals
        found = {}
        for label, total in totals.items():
            last = before.get(label, TierStats())
            counts = {name: getattr(total, name) - getattr(last, name) for name in COUNTS}
            found[label] = msgspec.structs.replace(total, **counts)
        return found

    def changes(self) -> list[TierChange]:
        store = self._store()
        return [] if store is None else store.changes()

    def _wants(self, name: BlockName) -> bool:
        store = self._store()
        return store is not None and store.wants(name)

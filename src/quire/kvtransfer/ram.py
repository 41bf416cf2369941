"""The tier in host memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict

from quire.kvtransfer.base import BlockBytes, Note, ignore
from quire.kvtransfer.codec import Codec
from quire.messages import BlockName

ENTRY_BYTES = 320
"""Beside its record, an entry takes so much: the name, a place in the table, the heads of the objects."""


class _Entry:
    __slots__ = ("record", "used")

    def __init__(self, record: bytes) -> None:
        self.record = record
        self.used = False


class RamTier:
    """A `Tier`: records in a table, of which the one that was put first goes first.

    An entry that was read since then is kept for another round, in its place among the others. Moving it
    to the end as it is read, as usual, would make the beginning of a prefix, which is read first, older
    than the rest, which is worthless without it. Blocks come in from the end of a prefix to its
    beginning, as the cache evicts them, and go in this order too.
    """

    label = "ram"
    is_on = True

    def __init__(self, capacity: int, codec: Codec) -> None:
        """capacity: in bytes, `ENTRY_BYTES` of each entry included."""
        self.capacity = capacity
        self.num_bytes = 0
        self.counts: Counter[str] = Counter()
        """As in `TierStats`."""
        self.note: Note = ignore
        self._codec = codec
        self._entries: OrderedDict[BlockName, _Entry] = OrderedDict()
        self._clears = 0
        """What was put before one is not kept after it."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, name: BlockName) -> bool:
        return name in self._entries

    def put(self, name: BlockName, data: BlockBytes) -> bool:
        with self._lock:
            clears = self._clears
            if (found := self._entries.get(name)) is not None:
                found.used = True
                return True
        entry = _Entry(self._codec.encode(data))
        size = len(entry.record) + ENTRY_BYTES
        if size > self.capacity:
            self.counts["dropped_blocks"] += 1
            return False
        with self._lock:
            if name in self._entries or clears != self._clears:
                return name in self._entries
            self._make_room(size)
            self._entries[name] = entry
            self.note(name, True)
            self.num_bytes += size
            self.counts["saved_blocks"] += 1
            self.counts["written_bytes"] += len(entry.record)
        return True

    def get(self, name: BlockName, out: BlockBytes) -> bool:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return False
            entry.used = True
            self.counts["read_bytes"] += len(entry.record)
        good = self._codec.decode(entry.record, out)
        with self._lock:
            self.counts["loaded_blocks" if good else "damaged_blocks"] += 1
            if good:
                return True
            if self._entries.get(name) is entry:
                self._remove(name)
        return False

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0
            self._clears += 1

    def close(self) -> None:
        self.clear()

    def _make_room(self, size: int) -> None:
        while self.num_bytes + size > self.capacity:
            name, entry = next(iter(self._entries.items()))
            if entry.used:
                entry.used = False
                self._entries.move_to_end(name)
            else:
                self._remove(name)
                self.counts["evicted_blocks"] += 1

    def _remove(self, name: BlockName) -> None:
        self.num_bytes -= len(self._entries.pop(name).record) + ENTRY_BYTES
        self.note(name, False)

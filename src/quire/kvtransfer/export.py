"""KV of requests that have ended here, held in host memory until another instance has fetched it.

A ticket stands for the KV of one request. It names no place: it is 128 random bits, a digest of the blocks'
names and a time after which it is worthless, under an HMAC. The first instance that comes with it is its only
reader. Its KV is held for LEASE_SECONDS, again after each renewal, until every rank of the reader is done.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from quire.kvtransfer.base import BlockBytes, Snapshot
from quire.messages import BlockName

logger = logging.getLogger("quire.kvtransfer")

LEASE_SECONDS = 30.0
TICKET_SECONDS = 3600.0
"""A ticket cannot be renewed for longer."""
_RANDOM, _DIGEST, _EXPIRY, _MAC = 16, 16, 6, 16
MOST_ENDED = 4096
"""Tickets that are remembered as worthless, so that nobody waits for their KV."""
TICKET_CHARS = 2 * (_RANDOM + _DIGEST + _EXPIRY + _MAC)


class Memory(Protocol):
    """Of one ticket's blocks, zeros at first."""

    def duplicate(self) -> int | None:
        """A descriptor for another process, which cannot write to it; None if it is closed."""
        ...

    def rows(self, count: int, size: int) -> list[BlockBytes]: ...

    def close(self) -> None:
        """Idempotent. Rows that are in use remain valid."""
        ...


class PrivateMemory:
    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(num_bytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # a quarter of the time of the first writes

    def rows(self, count: int, size: int) -> list[BlockBytes]:
        return list(np.frombuffer(self._map, np.uint8, count * size).reshape(count, size))

    def duplicate(self) -> None:
        return None

    def close(self) -> None:
        pass  # it is freed with its last row


class Tickets:
    """Makes and checks the tickets of one instance; all its ranks have the same key."""

    def __init__(self, key: bytes, engine_id: str) -> None:
        self._key = hmac.digest(key, b"tickets\0" + engine_id.encode(), "sha256")

    def make(self, names: Sequence[BlockName]) -> str:
        expiry = int(time.time() + TICKET_SECONDS).to_bytes(_EXPIRY, "big")
        body = os.urandom(_RANDOM) + digest(names) + expiry
        return (body + self._mac(body)).hex()

    def check(self, ticket: str, names: Sequence[BlockName] | None = None) -> bool:
        """Whether this instance made it, it has not expired, and (at the instance) it is for these names."""
        try:
            raw = bytes.fromhex(ticket) if len(ticket) == TICKET_CHARS else b""
        except ValueError:
            return False
        body, mac = raw[:-_MAC], raw[-_MAC:]
        if not raw or not hmac.compare_digest(mac, self._mac(body)):
            return False
        fits = names is None or body[_RANDOM : _RANDOM + _DIGEST] == digest(names)
        return fits and int.from_bytes(body[-_EXPIRY:], "big") > time.time()

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_MAC]


def digest(names: Sequence[BlockName]) -> bytes:
    hashed = hashlib.sha256()
    for name, group in names:
        hashed.update(b"%d %d " % (len(name), group) + name)
    return hashed.digest()[:_DIGEST]


@dataclass(slots=True)
class Held:
    """The KV of one ticket."""

    num_bytes: int
    ends: float
    """`time.monotonic()` at which the lease ends."""
    rows: dict[BlockName, tuple[int, BlockBytes]] = field(default_factory=dict)
    """By name, its place in the memory and its bytes. Empty until `reserve`."""
    memory: Memory | None = None
    snapshot: Snapshot | None = None
    """Set when the copies have begun."""
    reader: str | None = None
    """The instance that came first."""
    done: set[int] = field(default_factory=set)
    """Ranks of the reader that fetch no more."""


class ExportStore:
    """One rank's. All methods may be called from any thread."""

    def __init__(
        self,
        tickets: Tickets,
        *,
        block_bytes: int,
        max_bytes: int,
        memory: Callable[[int], Memory] = PrivateMemory,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self.tickets = tickets
        self.changed: Callable[[], None] = lambda: None
        """Called when a ticket's copies have begun, or there will be none."""
        self.closing: Callable[[], None] = lambda: None
        """Called by `close`, by which a server ends."""
        self._block_bytes, self._max_bytes = block_bytes, max_bytes
        self._memory, self._lease = memory, lease
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._ended: dict[str, None] = {}
        self._used = 0
        self.num_expired = 0
        """Requests whose KV nobody wanted until the end of the lease."""
        self._closed = False

    @property
    def used_bytes(self) -> int:
        return self._used

    def __len__(self) -> int:
        return len(self._held)

    def issue(self, names: Sequence[BlockName]) -> str | None:
        """A ticket for these blocks, for which room is kept from now on. None: there is none. At the
        sampling rank; the others hear of the ticket with the `Save`."""
        ticket = self.tickets.make(names)
        with self._lock:
            return ticket if self._admit(ticket, len(names)) else None

    def reserve(self, ticket: str, names: Sequence[BlockName]) -> Sequence[BlockBytes] | None:
        """Memory for the KV of these names, whose copies are about to begin. None: no room, and who comes
        with the ticket finds nothing. Does not wait."""
        with self._lock:
            rows = self._reserve(ticket, names) if self.tickets.check(ticket, names) else None
            if rows is None:
                self._end(ticket)
        if rows is None:
            self.changed()
        return rows

    def ready(self, ticket: str, snapshot: Snapshot) -> None:
        """What was reserved is filled once the snapshot has been waited for. Does not wait."""
        with self._lock:
            if (held := self._held.get(ticket)) is not None:
                held.snapshot = snapshot
        self.changed()

    def open(self, ticket: str, reader: str) -> Held | None:
        """For a reader, whose lease begins again. None: there is no KV for it. Without a snapshot, the copies
        have not begun yet."""
        if not self.tickets.check(ticket):
            return None
        with self._lock:
            self._expire()
            if ticket in self._ended:
                return None
            held = self._held.get(ticket) or Held(0, 0.0)
            if held.reader not in (None, reader):
                return None
            held.reader, held.ends = reader, time.monotonic() + self._lease
            return held

    def release(self, ticket: str, reader: str, ranks: set[int], count: int) -> None:
        """These ranks, of the `count` ranks of the reader, fetch no more."""
        with self._lock:
            held = self._held.get(ticket)
            if held is not None and held.reader in (None, reader) and self.tickets.check(ticket):
                held.reader = reader
                held.done |= ranks
                if len(held.done) >= count:
                    self._end(ticket)

    def expire(self) -> None:
        """Drop what has no lease any more."""
        with self._lock:
            self._expire()

    def clear(self) -> None:
        """Forget everything: the weights may be others from now on."""
        with self._lock:
            for ticket in list(self._held):
                self._end(ticket)
        self.changed()

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self.closing()
        self.clear()

    def _reserve(self, ticket: str, names: Sequence[BlockName]) -> list[BlockBytes] | None:
        held = self._held.get(ticket)
        if held is None and ticket not in self._ended:
            held = self._admit(ticket, len(names))
        if held is None or held.rows:
            return None
        try:
            held.memory = self._memory(held.num_bytes)
        except OSError as error:
            logger.warning("no memory to hold KV for another instance: %s", error)
            return None
        rows = held.memory.rows(len(names), self._block_bytes)
        held.rows = dict(zip(names, enumerate(rows), strict=True))
        return rows

    def _admit(self, ticket: str, count: int) -> Held | None:
        self._expire()
        num_bytes = count * self._block_bytes
        if self._closed or self._used + num_bytes > self._max_bytes:
            return None
        self._used += num_bytes
        held = self._held[ticket] = Held(num_bytes, time.monotonic() + self._lease)
        return held

    def _expire(self) -> None:
        now = time.monotonic()
        late = [ticket for ticket, held in self._held.items() if held.ends < now]
        for ticket in late:
            self._end(ticket)
        if late:
            self.num_expired += len(late)
            logger.warning(
                "KV of %d requests was not fetched by other instances in time", len(late)
            )

    def _end(self, ticket: str) -> None:
        held = self._held.pop(ticket, None)
        if held is not None:
            self._used -= held.num_bytes
            if held.memory is not None:
                held.memory.close()
        self._ended[ticket] = None
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

"""KV that is held for other instances: tickets, leases and bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kvtransfer import export
from quire.kvtransfer.export import ExportStore, Tickets
from tests.kvtransfer.instances import KEY, Filled, names

BLOCK = 4096


def make(max_blocks: int = 100, *, key: bytes = KEY, lease: float = 30.0) -> ExportStore:
    return ExportStore(
        Tickets(key, "P"), block_bytes=BLOCK, max_bytes=max_blocks * BLOCK, lease=lease
    )


def held(store: ExportStore, count: int = 3, seed: int = 0) -> str:
    wanted = names(count, seed, groups=1)
    ticket = store.issue(wanted)
    assert ticket is not None
    rows = store.reserve(ticket, wanted)
    assert rows is not None and len(rows) == count
    for row in rows:
        row[:] = 7
    store.ready(ticket, Filled())
    return ticket


def test_a_ticket_has_one_reader() -> None:
    store = make()
    ticket = held(store)
    first = store.open(ticket, "D")
    assert first is not None and first.snapshot is not None and len(first.rows) == 3
    assert store.open(ticket, "D") is first  # another of its ranks
    assert store.open(ticket, "E") is None
    store.release(ticket, "E", {0}, 1)
    store.release(ticket, "D", {0}, 2)
    assert len(store) == 1
    store.release(ticket, "D", {1}, 2)
    assert len(store) == 0 and store.used_bytes == 0
    assert store.open(ticket, "D") is None


def test_every_altered_character_makes_a_ticket_worthless() -> None:
    store = make()
    ticket = held(store)
    for at, letter in enumerate(ticket):
        forged = ticket[:at] + ("1" if letter == "0" else "0") + ticket[at + 1 :]
        assert store.open(forged, "D") is None
        store.release(forged, "D", {0}, 1)
    for wrong in ("", "0", ticket[:-2], ticket + "00", "g" * len(ticket), "\u0665" * len(ticket)):
        assert store.open(wrong, "D") is None
    assert len(store) == 1


@given(st.text(max_size=200))
def test_no_text_is_a_ticket(text: str) -> None:
    assert not Tickets(KEY, "P").check(text)


def test_tickets_of_another_key_or_instance_are_worthless() -> None:
    wanted = names(2)
    tickets = Tickets(KEY, "P")
    ticket = tickets.make(wanted)
    assert tickets.check(ticket) and tickets.check(ticket, wanted)
    assert not Tickets(b"x" * 20, "P").check(ticket)
    assert not Tickets(KEY, "Q").check(ticket)
    assert not tickets.check(ticket, wanted[:1]) and not tickets.check(ticket, wanted[::-1])
    assert len({tickets.make(wanted) for _ in range(100)}) == 100


def test_an_expired_ticket_is_worthless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TICKET_SECONDS", -1.0)
    store = make()
    ticket = store.issue(names(1))
    assert ticket is not None
    assert store.reserve(ticket, names(1)) is None
    assert store.open(ticket, "D") is None


def test_kv_that_does_not_fit_gets_no_ticket() -> None:
    store = make(5)
    held(store, 3)
    assert store.issue(names(3, 1, groups=1)) is None
    assert store.used_bytes == 3 * BLOCK
    assert store.issue(names(2, 1, groups=1)) is not None


def test_a_rank_without_room_has_nothing_at_once() -> None:
    """The other ranks get tickets that the sampling rank has made."""
    store, wanted = make(2), names(3, groups=1)
    ticket = Tickets(KEY, "P").make(wanted)
    found = store.open(ticket, "D")
    assert found is not None and found.snapshot is None  # its `Save` may be on the way
    assert store.reserve(ticket, wanted) is None
    assert store.open(ticket, "D") is None
    assert store.used_bytes == 0


def test_kv_is_reserved_once_and_for_its_own_names() -> None:
    store, wanted = make(), names(2, groups=1)
    tickets = [store.issue(wanted), store.issue(wanted)]
    assert tickets[0] is not None and tickets[1] is not None
    assert store.reserve(tickets[0], names(2, 9, groups=1)) is None
    assert store.reserve(tickets[0], wanted) is None
    assert store.reserve(tickets[1], wanted) is not None
    assert store.reserve(tickets[1], wanted) is None
    assert len(store) == 0


def test_no_memory_is_no_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(num_bytes: int) -> export.Memory:
        raise OSError(12, "Cannot allocate memory")

    store = ExportStore(Tickets(KEY, "P"), block_bytes=BLOCK, max_bytes=1 << 20, memory=fails)
    ticket = store.issue(names(1))
    assert ticket is not None and store.reserve(ticket, names(1)) is None
    assert store.used_bytes == 0 and store.open(ticket, "D") is None


def test_a_thousand_leases_end_and_leave_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(export.time, "monotonic", lambda: now)
    monkeypatch.setattr(export, "MOST_ENDED", 100)
    store = make(10_000)
    held(store)
    maps = mappings()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tickets = [held(store, seed=seed) for seed in range(1000)]
    assert store.used_bytes == 3003 * BLOCK
    now += 29.0
    assert store.open(tickets[500], "D") is not None
    now += 2.0
    store.expire()
    assert len(store) == 1 and store.used_bytes == 3 * BLOCK
    assert all(store.open(ticket, "D") is None for ticket in tickets[-90:])
    now += 31.0
    store.expire()
    del tickets
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(store) == 0 and store.used_bytes == 0 and store.num_expired == 1001
    assert after - before < 400_000  # of 2 MB
    assert mappings() < maps + 100


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_other_weights_end_all_tickets() -> None:
    store = make()
    tickets = [held(store, seed=seed) for seed in range(3)]
    store.clear()
    assert store.used_bytes == 0
    assert all(store.open(ticket, "D") is None for ticket in tickets)
    held(store, seed=4)
    store.close()
    store.close()
    assert store.used_bytes == 0 and store.issue(names(1)) is None

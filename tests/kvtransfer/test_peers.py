"""KV that goes from one instance to another."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from quire.config import KVTransfer
from quire.errors import ConfigError
from quire.kvtransfer import peer_client, peer_server, shared
from quire.kvtransfer.export import ExportStore, PrivateMemory, Tickets
from quire.kvtransfer.peer_server import PeerServer
from quire.kvtransfer.peering import Peering, create_peering
from quire.kvtransfer.share import KVShare
from tests.kvtransfer.instances import (
    FINGERPRINT,
    GROUPS,
    HEAD_BYTES,
    KEY,
    NUM_HEADS,
    SECONDS,
    TCP,
    UNIX,
    Instances,
    comes_true,
    divided,
    names,
)

BOTH = pytest.mark.parametrize("connector", [TCP, UNIX])


@BOTH
def test_blocks_arrive_as_they_were_held(connector: str, tmp_path: Path) -> None:
    with Instances(tmp_path, connector) as both:
        wanted = names(20)
        source = both.held(wanted)
        assert both.fetch(source, wanted[:7]) == 7
        assert both.fetch(source, wanted[7:]) == 33
        assert both.num_held == 1
        peers = both.readers[0].peers
        assert peers is not None
        peers.done(source)
        assert comes_true(lambda: both.num_held == 0)
        assert both.fetch(source, wanted) == 0


@BOTH
@pytest.mark.parametrize(
    ("holders", "readers"),
    [
        ((2, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((2, 1), (4, 1)),
        ((8, 1), (2, 1)),
        ((2, 1), (8, 1)),
        ((1, 2), (1, 1)),
        ((1, 1), (1, 2)),
        ((1, 2), (1, 3)),
        ((2, 2), (1, 3)),
        ((1, 3), (4, 2)),
    ],
)
def test_ranks_are_combined(
    connector: str, holders: tuple[int, int], readers: tuple[int, int], tmp_path: Path
) -> None:
    with Instances(
        tmp_path, connector, holders=divided(*holders), readers=divided(*readers)
    ) as both:
        wanted = names(5)
        source = both.held(wanted)
        for rank, reader in enumerate(both.readers):
            assert both.fetch(source, wanted, rank=rank) == len(wanted)
            assert both.num_held == len(both.holders)  # until all ranks are done
            assert reader.peers is not None
            reader.peers.done(source)
        assert comes_true(lambda: both.num_held == 0)


def test_a_fetch_waits_for_the_copies(tmp_path: Path) -> None:
    with Instances(tmp_path, holders=divided(2)) as both:
        wanted = names(3)
        source = both.source(both.issue(wanted))
        with ThreadPoolExecutor(1) as pool:
            fetched = pool.submit(both.fetch, source, wanted)
            time.sleep(0.05)
            assert not fetched.done()
            both.save(source.ticket, wanted)
            assert fetched.result(SECONDS) == len(wanted)


def test_a_fetch_does_not_wait_for_copies_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(num_bytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    with Instances(tmp_path) as both:
        wanted = names(3)
        source = both.source(both.issue(wanted))
        exports = both.holders[0].exports
        assert exports is not None
        with ThreadPoolExecutor(1) as pool:
            fetched = pool.submit(both.fetch, source, wanted, timeout=600.0)
            time.sleep(0.05)
            monkeypatch.setattr(exports, "_memory", fails)
            both.save(source.ticket, wanted)
            assert fetched.result(SECONDS) == 0


def test_a_fetch_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "SNAPSHOT_SECONDS", 0.1)
    with Instances(tmp_path) as both:
        source = both.source(both.issue(names(3)))
        assert both.fetch(source, names(3), timeout=600.0) == 0


@BOTH
def test_a_name_that_the_ticket_lacks_ends_the_run(connector: str, tmp_path: Path) -> None:
    with Instances(tmp_path, connector, holders=divided(2)) as both:
        wanted, others = names(3), names(3, 1)
        source = both.held(wanted)
        both.held(others)
        assert both.fetch(source, others) == 0
        assert both.fetch(source, [*wanted[:2], *others, *wanted[2:]]) == 2
        assert both.fetch(source, wanted[::-1]) == len(wanted)


@BOTH
def test_only_the_right_peers_meet(connector: str, tmp_path: Path) -> None:
    wanted = names(2)
    others = (
        {"reader_key": b"x" * 20},
        {"reader_key": b""},
        {"reader_fingerprint": b"f2"},
        {"peers": ("10.0.0.1", "unix:/elsewhere")},
        {"peers": ()},
        {"readers": divided(groups=((0, 1, 2), (3, 4)))},
        {"readers": divided(groups=(*GROUPS, (5,)))},
        {"readers": [KVShare(GROUPS, (0, NUM_HEADS + 1), HEAD_BYTES)]},
        {"readers": [KVShare(GROUPS, (0, NUM_HEADS), HEAD_BYTES + 1)]},
    )
    for index, options in enumerate(others):
        with Instances(tmp_path / str(index), connector, **options) as both:
            source = both.held(wanted)
            assert both.fetch(source, wanted) == 0, options
            assert both.num_held == 1


def test_a_client_never_chooses_who_is_connected_to(tmp_path: Path) -> None:
    with (
        Instances(tmp_path, peers=("127.0.0.1:9",)) as both,
        socket.create_server(("127.0.0.1", 0)) as victim,
    ):
        victim.settimeout(0.05)
        port = victim.getsockname()[1]
        peers = both.readers[0].peers
        assert peers is not None
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "unix:/tmp/x", ""):
            source = both.source("t", host=host, ports=(port,))
            assert both.fetch(source, names(1)) == 0
            peers.hold(source)
            peers.release(source)
        with pytest.raises(TimeoutError):
            victim.accept()


def test_beyond_this_machine_a_key_is_needed(tmp_path: Path) -> None:
    transfer = KVTransfer(kv_connector=TCP, kv_role="kv_producer", kv_ip="0.0.0.0", kv_port=0)
    with pytest.raises(ConfigError, match="QUIRE_KV_KEY"):
        create_peering(transfer, divided()[0], b"f", key=b"", engine_id="P")
    with Instances(tmp_path, key=b"", peers=("192.0.2.1", "127.0.0.1")) as both:
        wanted = names(1)
        source = both.held(wanted)
        assert both.fetch(both.source(source.ticket, host="192.0.2.1"), wanted) == 0
        assert both.fetch(source, wanted) == len(wanted)


def test_another_instance_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    with Instances(tmp_path) as both:
        source = both.held(names(1))
        assert both.fetch(both.source(source.ticket, engine_id="Q"), names(1)) == 0


@BOTH
def test_a_restarted_peer_is_found_again(connector: str, tmp_path: Path) -> None:
    with Instances(tmp_path, connector) as first, ExitStack() as stack:
        wanted = names(2)
        source = first.held(wanted)
        assert first.fetch(source, wanted) == len(wanted)
        first.holders[0].close()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(peer_client, "DOWN_SECONDS", 0.0)
        patch.setattr(peer_server, "SNAPSHOT_SECONDS", 0.1)
        assert first.fetch(source, wanted) == 0
        if connector == TCP:
            listener = socket.create_server(("127.0.0.1", source.ports[0]))
        else:
            listener = shared.listen(first.host.removeprefix("unix:"), source.ports[0])
        memory = PrivateMemory if connector == TCP else shared.SharedMemory
        exports = ExportStore(
            Tickets(KEY, "P"),
            block_bytes=first.holder_shares[0].block_bytes,
            max_bytes=1 << 20,
            memory=memory,
        )
        server = PeerServer(
            listener,
            exports,
            key=KEY,
            engine_id="P",
            share=first.holder_shares[0],
            fingerprint=FINGERPRINT,
        )
        first.holders[0] = Peering(source.ports[0], exports, None, server)
        stack.callback(first.holders[0].close)
        assert first.fetch(source, wanted) == 0  # its ticket was the old one's
        assert first.fetch(first.held(wanted), wanted) == len(wanted)


def test_a_held_lease_is_renewed_until_it_is_released(tmp_path: Path) -> None:
    with Instances(tmp_path, lease=0.4, holders=divided(2)) as both:
        peers = both.readers[0].peers
        assert peers is not None
        kept, left = both.held(names(3)), both.held(names(3, 1))
        peers.hold(kept)
        assert comes_true(lambda: both.num_held == 2)
        time.sleep(0.8)
        assert both.num_held == 2
        assert both.fetch(left, names(3, 1)) == 0
        assert both.fetch(kept, names(3)) == 6
        peers.release(kept)
        assert comes_true(lambda: both.num_held == 0)
        assert both.fetch(kept, names(3)) == 0


def test_many_leases_are_renewed_together(tmp_path: Path) -> None:
    with Instances(tmp_path, lease=1.0) as both:
        peers = both.readers[0].peers
        assert peers is not None
        for seed in range(200):
            peers.hold(both.held(names(1, seed)))
        time.sleep(2.0)
        assert both.num_held == 200
        peers.close()
        assert comes_true(lambda: both.num_held == 0, 10.0)


def test_the_lease_of_a_killed_reader_ends(tmp_path: Path) -> None:
    with Instances(tmp_path, lease=0.5) as both:
        peers = both.readers[0].peers
        assert peers is not None
        source = both.held(names(2))
        assert both.fetch(source, names(2)) == 4
        assert comes_true(lambda: both.num_held == 0, 5.0)


def test_closing_ends_a_fetch(tmp_path: Path) -> None:
    with Instances(tmp_path) as both:
        source = both.source(both.issue(names(1)))  # never saved
        with ThreadPoolExecutor(1) as pool:
            fetched = pool.submit(both.fetch, source, names(1), timeout=600.0)
            time.sleep(0.1)
            peers = both.readers[0].peers
            assert peers is not None
            peers.close()
            assert fetched.result(4.0) == 0


def test_several_fetches_at_once(tmp_path: Path) -> None:
    with Instances(tmp_path) as both, ThreadPoolExecutor(8) as pool:
        sources = [both.held(names(10, seed)) for seed in range(16)]
        fetches = [pool.submit(both.fetch, s, names(10, i)) for i, s in enumerate(sources)]
        assert [fetch.result(SECONDS) for fetch in fetches] == [20] * 16


@BOTH
def test_nothing_is_left(connector: str, tmp_path: Path) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once(path: Path) -> None:
        with Instances(path, connector, holders=divided(2), readers=divided(1, 2)) as both:
            source = both.held(names(4))
            peers = both.readers[0].peers
            assert peers is not None
            peers.hold(source)
            assert both.fetch(source, names(4)) == 8
            assert both.fetch(source, names(4), rank=1) == 8

    once(tmp_path / "0")
    before = count()
    for index in range(5):
        once(tmp_path / str(index + 1))
    assert comes_true(lambda: count() <= before)


def test_the_server_ends_with_its_exports(tmp_path: Path) -> None:
    with Instances(tmp_path, UNIX) as both:
        holder = both.holders[0]
        assert holder.exports is not None
        holder.exports.close()
        assert not any(each.name == "quire-kv-server" for each in threading.enumerate())
        assert not list(tmp_path.iterdir())


def test_leases_are_kept_whatever_a_source_names(tmp_path: Path) -> None:
    with Instances(tmp_path, peers=("127.0.0.1",)) as both:
        peers, wanted = both.readers[0].peers, names(3)
        assert peers is not None
        wrong = both.source("t", ports=(10**30,))
        peers.hold(wrong)
        peers.release(wrong)
        assert both.fetch(wrong, wanted) == 0
        source = both.held(wanted)
        peers.release(source)
        assert comes_true(lambda: both.num_held == 0)

"""kill -9 of either instance while KV is on its way: what has come is right, and all memory is free in time.

python -m tests.kvtransfer.test_killed holder|reader CONNECTOR FOLDER   (the process that is killed)
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from quire.kvtransfer.share import KVShare
from quire.messages import KVSource
from tests.kvtransfer.instances import SECONDS, TCP, UNIX, Instances, comes_true, names

SHARE = KVShare(((0, 1),), (0, 4), 16_384)
"""Blocks of 256 KiB."""
COUNT = 64
LEASE = 1.5


def both(folder: Path, connector: str, lease: float = LEASE) -> Instances:
    """Both instances, of which a process uses one."""
    return Instances(
        folder, connector, holders=[SHARE], readers=[SHARE], lease=lease, max_bytes=1 << 26
    )


@contextmanager
def child(role: str, connector: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.kvtransfer.test_killed", role, connector, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("connector", [TCP, UNIX])
def test_a_killed_holder_costs_blocks_only(connector: str, tmp_path: Path) -> None:
    wanted = names(COUNT, groups=1)
    (tmp_path / "here").mkdir()
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with child("holder", connector, folder) as holder:
            assert holder.stdout is not None
            source = msgspec.json.decode(holder.stdout.readline(), type=KVSource)
            peers = (source.host,)
            with Instances(
                tmp_path / "here", connector, readers=[SHARE], holders=[SHARE], peers=peers
            ) as mine:
                assert mine.fetch(source, wanted[:1]) == 1
                delay = random.Random(seed).uniform(0.0, 0.05)
                killer = threading.Timer(delay, holder.kill)
                killer.start()
                began = time.monotonic()
                good = mine.fetch(source, wanted, timeout=600.0)
                assert 0 <= good <= COUNT and time.monotonic() - began < SECONDS
                killer.join()
                holder.wait(SECONDS)
                assert mine.fetch(source, wanted, timeout=600.0) == 0


@pytest.mark.parametrize("connector", [TCP, UNIX])
def test_a_killed_reader_leaves_no_memory(connector: str, tmp_path: Path) -> None:
    wanted = names(COUNT, groups=1)
    with both(tmp_path, connector) as mine:
        exports, server = mine.holders[0].exports, mine.holders[0].server
        assert exports is not None and server is not None
        for seed in (0,) if connector == UNIX else (0, 1):  # the first outlasts a lease
            (tmp_path / str(seed)).mkdir()
            with child("reader", connector, tmp_path / str(seed)) as reader:
                assert reader.stdin is not None and reader.stdout is not None
                reader.stdout.readline()  # it has started
                source = mine.held(wanted)
                reader.stdin.write(msgspec.json.encode(source).decode() + "\n")
                reader.stdin.flush()
                reader.stdout.readline()  # it has fetched once, and renews and fetches for ever
                time.sleep(random.Random(seed).uniform(0.0, 2 * LEASE))
                assert len(exports) == 1
                reader.kill()
                reader.wait(SECONDS)
            assert comes_true(lambda: len(exports) == 0 and server.num_connections == 0)
            assert exports.used_bytes == 0


def main(role: str, connector: str, folder: str) -> None:
    wanted = names(COUNT, groups=1)
    if role == "holder":
        with both(Path(folder), connector, lease=600.0) as mine:
            source = mine.held(wanted)
            print(msgspec.json.encode(source).decode(), flush=True)
            while True:
                time.sleep(60)
    print("started", flush=True)
    source = msgspec.json.decode(sys.stdin.readline(), type=KVSource)
    with Instances(
        Path(folder), connector, holders=[SHARE], readers=[SHARE], peers=(source.host,), lease=LEASE
    ) as mine:
        peers = mine.readers[0].peers
        assert peers is not None
        peers.hold(source)
        while True:
            assert mine.fetch(source, wanted) == COUNT
            print("fetched", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

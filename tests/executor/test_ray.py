"""Ranks as actors: the tokens of one device on one node and on two, a rank that dies, and nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.config.flat import from_flat
from quire.errors import ConfigError
from quire.executor.ray import RayRanks, SharedMemory, WorkerError
from tests.integrations.ray_cluster import RayCluster, two_nodes

ROOT = Path(__file__).resolve().parents[2]
PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


class Engines:
    """`ray_engine`: an engine of each of these layouts, TENSORxSTAGES."""

    def __init__(self, environ: dict[str, str], *layouts: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.executor.ray_engine", *layouts],
            cwd=ROOT, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def says(self) -> object:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("[[", '"')):  # others, and what may follow in the line, are Ray's
                return json.JSONDecoder().raw_decode(line)[0]
        raise AssertionError("the engine has ended")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    with two_nodes(2) as found:
        yield found


def actors(cluster: RayCluster) -> list[int]:
    return [pid for pid, command in cluster.processes() if "RankActor" in command]


def test_the_tokens_of_one_device_and_ranks_that_die(cluster: RayCluster) -> None:
    """Two ranks are on one node and share memory; of four, some are on the other node, so they use gloo,
    and the stages links.
    A rank is killed, and then a node: Ray's daemon there, which its actors must not survive."""
    engines = Engines(cluster.environ, "1x1", "2x1", "2x2")
    try:
        expected = engines.says()
        engines.tell("next")
        assert engines.says() == expected
        (rank,) = actors(cluster)
        engines.tell("endless")
        time.sleep(0.5)
        os.kill(rank, signal.SIGKILL)
        error = str(engines.says())
        assert error.startswith(f"WorkerError: Rank 1 (pid {rank} on node ")
        assert "its worker process has died" in error

        assert engines.says() == expected and len(actors(cluster)) == 3
        engines.tell("endless")
        time.sleep(0.5)
        daemons = [pid for pid, command in cluster.processes() if "/raylet/raylet " in command]
        os.kill(daemons[-1], signal.SIGKILL)
        assert re.match(r"WorkerError: Rank \d \(pid \d+ on node ", str(engines.says()))
    finally:
        engines.close()
    deadline = time.monotonic() + 30
    while left := actors(cluster):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_cluster_without_room_is_an_error(cluster: RayCluster) -> None:
    code = (
        "import quire.executor.ray as r; from quire.config.flat import from_flat\n"
        "r.PLACE_HERE_SECONDS = r.PLACE_SECONDS = 0.5\n"
        f"r.RayRanks(from_flat({PARALLEL | {'cpu_threads': 3}!r}), 'cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=cluster.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "ConfigError: The Ray cluster has no room for 1 more ranks with 3 CPUs each" in done.stderr
    )


def test_ray_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"needs Ray, which is not installed; `pip install 'quire\[ray\]'`"
    ):
        RayRanks(from_flat(PARALLEL), "cpu")
    with pytest.raises(ConfigError, match="places ranks on CPUs only; use mp"):
        RayRanks(from_flat(PARALLEL), "cuda")


def test_memory_of_another_process_is_known_by_its_inode() -> None:
    memory, other = os.memfd_create("memory"), os.memfd_create("other")
    shared = SharedMemory(os.getpid(), memory, os.fstat(memory).st_ino)
    found = shared.open()
    os.write(found, b"here")
    assert os.pread(memory, 4, 0) == b"here"
    with pytest.raises(WorkerError, match="is another file"):
        shared._replace(descriptor=other).open()
    for descriptor in (memory, other, found):
        os.close(descriptor)
    with pytest.raises(WorkerError, match="cannot be opened: No such file"):
        shared.open()

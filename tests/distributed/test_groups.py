"""Groups over processes: the bits of gathers, ranks that are killed or stopped, what is left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch

from quire.distributed import shared_memory
from quire.distributed.create import create_group
from quire.distributed.shared_memory import SharedMemoryGroup, create_memory
from quire.errors import ConfigError, WorkerError
from quire.kernels.group import Group
from tests.distributed import rank as rank_program

ROOT = Path(__file__).parents[2]
SECONDS = rank_program.SECONDS


@pytest.fixture(scope="module")
def nursery() -> Iterator[socket.socket]:
    """Forks ranks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.rank", str(theirs.fileno())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    yield ours
    ours.close()
    assert process.wait(SECONDS) == 0


class Ranks:
    """Rank 0 here, the others as processes."""

    def __init__(self, nursery: socket.socket, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        self.address = "-"
        if kind == "shared_memory":
            self.descriptor = create_memory(1 << 20)
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
            self.descriptor = listener.detach()
        self.outputs: list[TextIO] = []
        for rank in range(1, size):
            read, write = os.pipe()
            self.outputs.append(os.fdopen(read))
            passed = [write, self.descriptor] if kind == "shared_memory" else [write]
            message = f"{kind} {rank} {size} {self.address}".encode()
            socket.send_fds(nursery, [message], passed)
            os.close(write)

    def join(self) -> Group:
        group = create_group(
            self.kind,
            rank=0,
            size=self.size,
            timeout=SECONDS,
            descriptor=self.descriptor,
            address=self.address,
        )
        if self.kind == "shared_memory":
            os.close(self.descriptor)
        return group

    def line(self, rank: int) -> str:
        return self.outputs[rank - 1].readline().strip()

    def end(self) -> None:
        """Wait until all have ended."""
        for output in self.outputs:
            assert output.read() == ""
            output.close()


def open_files() -> list[str]:
    """Sockets, memory, files."""
    gc.collect()
    names = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue
    # gloo's thread keeps a pipe for the life of the process.
    return sorted(re.sub(r"\d+", "N", name) for name in names if not name.startswith("pipe:"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_that_share_memory(
    native: None, nursery: socket.socket, how: signal.Signals
) -> None:
    before = open_files()
    ranks = Ranks(nursery, "shared_memory", 3)
    group = ranks.join()
    assert isinstance(group, SharedMemoryGroup)
    digests = [rank_program.gather_all(group), ranks.line(1), ranks.line(2)]
    assert set(digests) == {rank_program.expected(3)}
    for _ in range(10):
        group.barrier()
    view = group.c_group.native
    view.timeout = 5.0
    victim = view.words.contents.ranks[1].pid
    os.kill(victim, how)
    error = rank_program.wait_until_failure(group)
    what = "has ended" if how is signal.SIGKILL else "is late by 5 s"
    assert error == f"Rank 1 (pid {victim}) {what}."
    assert ranks.line(2) == error
    if how is signal.SIGSTOP:
        os.kill(victim, signal.SIGCONT)
        assert ranks.line(1) == error
    ranks.end()
    group.close()
    assert open_files() == before
    assert "quire-group" not in Path("/proc/self/maps").read_text()


def test_a_process_that_is_killed_over_gloo(nursery: socket.socket) -> None:
    before = open_files()
    ranks = Ranks(nursery, "gloo", 3)
    group = ranks.join()
    digests = [rank_program.gather_all(group), ranks.line(1), ranks.line(2)]
    assert set(digests) == {rank_program.expected(3)}
    for _ in range(5):
        group.barrier()
    group.close()  # it ends
    error = ranks.line(1)
    assert re.match(r"One of ranks 0, 2 has ended, or is late: \w+", error), error
    ranks.line(2)
    ranks.end()
    with pytest.raises(WorkerError, match="closed"):
        group.barrier()
    del group
    assert open_files() == before


def test_a_watcher_ends_a_wait_over_gloo() -> None:
    groups = in_threads("gloo", 2, timeout=SECONDS)
    watcher = threading.Timer(0.2, groups[0].abort, ("Rank 1 was killed by SIGKILL.",))  # type: ignore[attr-defined]
    watcher.start()
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^Rank 1 was killed by SIGKILL\.$"):
        groups[0].gather(torch.ones(2, 3), 0, 5)
    assert time.monotonic() - began < SECONDS / 2
    watcher.join()
    for group in groups:
        group.close()


def test_a_late_rank_over_gloo() -> None:
    groups = in_threads("gloo", 2, timeout=2)
    with pytest.raises(WorkerError, match=r"Rank 1 has ended, or is late: Timed out"):
        groups[0].gather(torch.ones(2, 3), 0, 5)
    for group in groups:
        group.close()
        group.close()


def gathered(group: Group, x: torch.Tensor, begin: int, end: int, into: dict[int, object]) -> None:
    try:
        into[group.rank] = group.gather(x[:, begin:end], begin, x.shape[1])
    except WorkerError as error:
        into[group.rank] = error


def together(groups: list[Group], x: torch.Tensor, cuts: list[int]) -> dict[int, object]:
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=gathered, args=(group, x, cuts[i], cuts[i + 1], found))
        for i, group in enumerate(groups)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def in_threads(kind: str, size: int, timeout: float = 20.0, num_groups: int = 1) -> list[Group]:
    """The ranks of one group after those of another; groups of gloo share a store."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    descriptor = create_memory(0) if kind == "shared_memory" else listener.detach()
    groups: dict[int, Group] = {}

    def join(number: int) -> None:
        own = descriptor if number == 0 or kind == "shared_memory" else -1
        groups[number] = create_group(
            kind,
            rank=number % size,
            size=size,
            timeout=timeout,
            descriptor=own,
            address=address,
            name=f"group {number // size}",
        )
        groups[number].barrier()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(num_groups * size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if kind == "shared_memory":
        os.close(descriptor)
        listener.close()
    return [groups[number] for number in range(num_groups * size)]


def test_a_result_is_kept_when_the_next_gathers_come(native: None) -> None:
    """And a tensor above the buffer is gathered in pieces."""
    groups = in_threads("shared_memory", 2)
    first = torch.randn(5, 7)
    kept = together(groups, first, [0, 3, 7])
    big = torch.randn(9000, 301)  # more than two buffers
    found = together(groups, big, [0, 150, 301])
    for rank in range(2):
        assert torch.equal(kept[rank], first)  # type: ignore[arg-type]
        assert torch.equal(found[rank], big)  # type: ignore[arg-type]
    for group in groups:
        group.close()


def test_columns_that_are_no_whole_are_an_error() -> None:
    groups = in_threads("gloo", 2)
    x = torch.randn(3, 10)
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=gathered, args=(group, x, begin, end, found))
        for group, begin, end in ((groups[0], 0, 4), (groups[1], 5, 10))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found.values():
        assert isinstance(error, WorkerError)
        assert "no rank begins at byte 16 of 40 of a row" in str(error)
    for group in groups:
        group.close()


def test_groups_that_meet_at_one_store() -> None:
    groups = in_threads("gloo", 2, num_groups=2)
    for number in range(2):
        x = torch.full((3, 10), number)
        found = together(groups[2 * number : 2 * number + 2], x, [0, 4, 10])
        assert all(torch.equal(found[rank], x) for rank in range(2))  # type: ignore[arg-type]
    for group in groups:
        group.close()


def test_ranks_that_do_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        descriptor = os.dup(listener.fileno())
        group = create_group(
            "gloo", rank=0, size=2, timeout=0.5, descriptor=descriptor, address=address
        )
        with pytest.raises(
            WorkerError, match=r"Rank 0 did not meet the other ranks at 127\.0\.0\.1"
        ):
            group.barrier()


def test_wrong_kinds_and_sizes(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="one of shared_memory, gloo, nccl, got 'mpi'"):
        create_group("mpi", rank=0, size=2, timeout=1)
    with pytest.raises(ConfigError, match="65 ranks are above 64"):
        create_group("shared_memory", rank=0, size=65, timeout=1)
    with pytest.raises(ConfigError, match="cannot share memory"):
        create_group("shared_memory", rank=0, size=2, timeout=1, descriptor=10**6)
    monkeypatch.setattr(shared_memory.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="need Linux, this is darwin"):
        create_memory(0)

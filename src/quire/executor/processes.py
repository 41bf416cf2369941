"""Ranks as child processes of this one. Without torch: they start before this process imports it.

A rank ends at once when its standard input ends, which happens however this process dies. While it is
stopped (SIGSTOP), the system ends it when the thread that started it ends; so a thread of its own starts
the ranks and lives as long as they do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from quire.config.parallel import ParallelConfig
from quire.distributed.links import Link, pair
from quire.executor.ranks import Rank
from quire.util.environment import child_environment
from quire.util.processes import ending

MODULE = "quire.engine.worker_process"
GRACE_SECONDS = 1.0
"""Until a rank whose standard input has ended is killed."""


def ranks_of(parallel: ParallelConfig) -> ProcessRanks | None:
    """Start what the options ask for; None if that is nothing."""
    # Ray, and nodes that compare their configurations first, need the whole configuration.
    later = parallel.distributed_executor_backend == "ray" or parallel.nnodes > 1
    return ProcessRanks(parallel) if parallel.world_size > 1 and not later else None


def start_rank(
    number: int, link: socket.socket, memory: int = -1, model: str = ""
) -> subprocess.Popen[bytes]:
    """See `quire.engine.worker_process`."""
    words = map(str, (number, link.fileno(), memory))
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *words, model],
        stdin=subprocess.PIPE,
        pass_fds=[each for each in (link.fileno(), memory) if each >= 0],
        start_new_session=True,
        env=child_environment(),
    )


@dataclass(slots=True)
class ProcessRank:
    """A `Rank`."""

    number: int
    process: subprocess.Popen[bytes]
    link: Link
    name: str

    def reason(self) -> str:
        try:
            status = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "has closed its link"
        return ending(status)

    def end(self) -> None:
        self.hang_up()
        self.wait(time.monotonic() + GRACE_SECONDS)

    def hang_up(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.link.close()

    def wait(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ProcessRanks:
    """`Ranks` of this machine."""

    def __init__(self, parallel: ParallelConfig, numbers: Sequence[int] | None = None) -> None:
        """Starts the processes and returns. numbers: of the ranks; None: all that do not sample."""
        tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        self.ranks: list[Rank] = []
        self._processes: list[ProcessRank] = []
        self.group_memory = os.memfd_create("quire-ranks")
        self._timeout = parallel.worker_timeout
        self._started, self._closed = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        sampling = tensor * (stages - 1)
        if numbers is None:
            numbers = [number for number in range(parallel.world_size) if number != sampling]
        keeper = threading.Thread(target=self._keep, args=(numbers,), name="ranks", daemon=True)
        keeper.start()
        self._started.wait()
        if self._error is not None:
            self.close()
            raise self._error

    host = None

    def close(self) -> None:
        """Idempotent."""
        for rank in self._processes:
            rank.hang_up()
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in self._processes:
            rank.wait(deadline)
        if not self._closed.is_set():
            os.close(self.group_memory)
        self._closed.set()

    def _keep(self, numbers: Sequence[int]) -> None:
        try:
            for number in numbers:
                rank = self._start(number)
                self._processes.append(rank)
                self.ranks.append(rank)
        except BaseException as error:
            self._error = error
        self._started.set()
        self._closed.wait()

    def _start(self, number: int) -> ProcessRank:
        link, theirs = pair(f"rank {number}", timeout=self._timeout)
        with theirs:
            process = start_rank(number, theirs, self.group_memory)
        name = link.peer = f"rank {number} (pid {process.pid})"
        return ProcessRank(number, process, link, name)

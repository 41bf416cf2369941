"""A machine that is not the first: it starts its ranks, and ends when they do. No HTTP, no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from quire.config import EngineConfig
from quire.distributed.hello import connect, read_key
from quire.distributed.links import Link
from quire.engine.setup import locate, resolve
from quire.executor.nodes import START_SECONDS, facts, numbers_of
from quire.executor.processes import GRACE_SECONDS, start_rank
from quire.util.cores import pinned, shares

logger = logging.getLogger("quire.engine")


def run_node(config: EngineConfig) -> int:
    """Until the first node or a rank of this one ends. Returns the exit status. Raises `ConfigError`,
    `ModelError`."""
    config = locate(config)
    resolved = resolve(config)
    parallel = config.parallel
    numbers = numbers_of(parallel, parallel.node_rank)
    key = read_key(parallel.node_key_file)
    same = facts(config, resolved.dtype, resolved.model_dir)
    where = (parallel.master_addr, parallel.master_port)
    logger.info("rank %s: waiting for the other nodes at %s:%d", _text(numbers), *where)
    links = _connect(numbers, lambda n: connect(*where, key, same, n, timeout=START_SECONDS))
    with _termination() as ended:
        return _run(numbers, links, str(resolved.model_dir), ended)


def _connect(numbers: list[int], connect: Callable[[int], Link]) -> list[Link]:
    """All at once: none is answered before all have come. In threads that do not delay the process's end."""
    found: queue.SimpleQueue[tuple[int, Link | Exception]] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            found.put((number, connect(number)))
        except Exception as error:
            found.put((number, error))

    for number in numbers:
        threading.Thread(target=run, args=(number,), daemon=True).start()
    links = {}
    for _ in numbers:
        number, link = found.get()
        if isinstance(link, Exception):
            raise link
        links[number] = link
    return [links[number] for number in numbers]


def _run(numbers: list[int], links: list[Link], model: str, ended: int) -> int:
    processes: dict[int, subprocess.Popen[bytes]] = {}
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    opened = []
    try:
        for number, link, cores in zip(numbers, links, shares(len(numbers)), strict=True):
            with pinned(cores), socket.socket(fileno=link.detach()) as sock:
                processes[number] = start_rank(number, sock, model=model)
            opened.append(os.pidfd_open(processes[number].pid))
            poller.register(opened[-1], select.POLLIN)
        logger.info("rank %s: started, by the first node's options", _text(numbers))
        poller.poll()
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        for descriptor in opened:
            os.close(descriptor)
    failed = {number: each.returncode for number, each in processes.items() if each.returncode}
    for number, status in failed.items():
        logger.error("rank %d ended with status %d", number, status)
    if not failed:
        logger.info("rank %s: ended", _text(numbers))
    return 1 if failed else 0


def _text(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


@contextlib.contextmanager
def _termination() -> Iterator[int]:
    """A descriptor that is readable after SIGTERM or SIGINT."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    handlers = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield read
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)

"""The end of a process whose parent has ended. Without torch: it is watched for while torch is imported."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn


def exit_now(status: int) -> NoReturn:
    """Without the interpreter's own end, which aborts if a thread that it does not wait for wakes up then."""
    logging.shutdown()
    os._exit(status)


def exit_when_closed(
    descriptors: Iterable[int],
    before: Callable[[], object] = lambda: None,
    processes: Iterable[int] = (),
) -> None:
    """End this process at once when the other end of one of these is closed, or one of these processes has
    ended, whatever its main thread is doing. before: called first."""
    poller = select.poll()
    for process in processes:
        poller.register(os.pidfd_open(process), select.POLLIN)
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLRDHUP | select.POLLHUP)

    def watch() -> None:
        poller.poll()
        before()
        os._exit(0)

    threading.Thread(target=watch, name="death watch", daemon=True).start()

"""The end of a process whose parent has ended. Without torch: it is watched for while torch is imported."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable


def exit_when_closed(descriptors: Iterable[int], processes: Iterable[int] = ()) -> None:
    """End this process at once when the other end of one of these is closed, or one of these processes has
    ended, whatever its main thread is doing."""
    poller = select.poll()
    for process in processes:
        poller.register(os.pidfd_open(process), select.POLLIN)
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLRDHUP | select.POLLHUP)

    def watch() -> None:
        poller.poll()
        os._exit(0)

    threading.Thread(target=watch, name="death watch", daemon=True).start()

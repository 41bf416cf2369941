"""A rank's own process: `python -m quire.engine.worker_process NUMBER LINK MEMORY MODEL`.

LINK and MEMORY are descriptors: of a socket to the executor, and of the memory that the stage's ranks share,
if they do. MODEL is where this machine has the checkpoint, if it is not the executor's machine.
Importing torch does not depend on the configuration, so it may come late. The process ends when its standard
input or its link ends.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import sys

from quire.distributed.links import Link
from quire.executor.death import exit_now, exit_when_closed

PR_SET_PDEATHSIG = 1


def main(number: int, link: int, memory: int, model: str) -> int:
    gc.disable()  # as in `core_process`
    exit_when_closed([sys.stdin.fileno(), link])
    if sys.platform == "linux":  # while it is stopped, it notices no end of a pipe
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from quire.engine.rank import run_rank

    return run_rank(Link(socket.socket(fileno=link), "the engine core"), number, memory, model)


if __name__ == "__main__":
    number, link, memory, model = sys.argv[1:]
    exit_now(main(int(number), int(link), int(memory), model))

"""A rank's own process: `python -m quire.engine.worker_process NUMBER LINK MEMORY [ADDRESS MODEL]`.

LINK and MEMORY are descriptors: of a socket to the executor, and of the memory that the stage's ranks share.
ADDRESS is where they meet if they are on several machines, MODEL where this machine has the checkpoint.
Importing torch does not depend on the configuration, so it may come late. The process ends when its standard
input or its link ends.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1


def main(number: int, link: int, memory: int, address: str = "", model: str = "") -> int:
    gc.disable()  # as in `core_process`
    from quire.distributed.links import Link
    from quire.executor.death import exit_when_closed

    exit_when_closed([sys.stdin.fileno(), link])
    if sys.platform == "linux":  # while it is stopped, it notices no end of a pipe
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from quire.engine.rank import run_rank
    from quire.executor.ranks import Meeting

    meeting = Meeting(-1, address) if address else Meeting(memory)
    return run_rank(Link(socket.socket(fileno=link), "the engine core"), number, meeting, model)


if __name__ == "__main__":
    first, second, third, *texts = sys.argv[1:]
    sys.exit(main(int(first), int(second), int(third), *texts))

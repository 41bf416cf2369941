"""Ranks in processes of their own: gathers, then barriers until one fails. Each prints a line for both."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys

import torch

from quire.distributed.create import create_group
from quire.errors import WorkerError
from quire.kernels.cpu.library import load_library
from quire.kernels.group import Group

SECONDS = 120.0
"""Enough for anything on a busy machine."""
CUTS = {
    2: [(0, 4, 8), (0, 6, 9), (0, 1, 577), (0, 1, 1_300_000)],
    3: [(0, 3, 6, 9), (0, 4, 7, 10), (0, 2, 3, 10), (0, 1, 2, 577)],
}
"""By ranks: where their columns begin, and the width. Some widths twice, divided in other ways."""
DTYPES = (torch.float32, torch.bfloat16)


def whole(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(rows * width, dtype=torch.int64) * 2654435761 % 65521
    return values.view(rows, width).to(dtype)


def gather_all(group: Group) -> str:
    """A digest of the bits of many gathers."""
    digest = hashlib.sha256()
    for cuts in CUTS[group.size]:
        begin, end, width = cuts[group.rank], cuts[group.rank + 1], cuts[-1]
        for dtype in DTYPES:
            for rows in (1, 7, 0, 0 if width > 1000 else 3000):
                everything = whole(rows, width, dtype)
                gathered = group.gather(everything[:, begin:end], begin, width)
                assert gathered.shape == (rows, width) and gathered.dtype == dtype
                digest.update(gathered.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def expected(size: int) -> str:
    digest = hashlib.sha256()
    for cuts in CUTS[size]:
        for dtype in DTYPES:
            for rows in (1, 7, 0, 0 if cuts[-1] > 1000 else 3000):
                digest.update(whole(rows, cuts[-1], dtype).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def wait_until_failure(group: Group) -> str:
    try:
        while True:
            group.barrier()
    except WorkerError as error:
        return str(error)


def run(kind: str, rank: str, size: str, address: str, descriptor: int) -> None:
    group = create_group(
        kind,
        rank=int(rank),
        size=int(size),
        timeout=SECONDS,
        descriptor=descriptor,
        address=address,
    )
    print(gather_all(group), flush=True)
    print(wait_until_failure(group), flush=True)
    group.close()


def main(descriptor: str) -> None:
    """Fork a rank for each message of a socket: importing torch takes seconds. A message has the
    descriptor of the rank's standard output, and that of the group's memory."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    requests = socket.socket(fileno=int(descriptor))
    load_library()
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1000, 2)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            os.dup2(descriptors[0], 1)
            os.close(descriptors[0])
            kind, rank, size, address = message.decode().split()
            run(kind, rank, size, address, descriptors[1] if len(descriptors) > 1 else -1)
            os._exit(0)
        for one in descriptors:
            os.close(one)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What ranks pay to exchange: a barrier, and gathers of wholes of some sizes, between two processes.

    python -m bench.gather [--kinds shared_memory gloo] [--json FILE]

Each rank has a core of its own, and half of the columns. A recorded program pays the barrier for a gather in
shared memory, where the results are in their place already. The sizes are of `Group.gather`, of the eager
pass, which also copies in and out. Times are microseconds, as rank 0 sees them. Run it as a measurement
(`chrt -f 1`): a rank that has lost its core is milliseconds late.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quire.bench.record import run_record
from quire.distributed.create import create_group
from quire.distributed.shared_memory import create_memory
from quire.kernels.group import Group
from quire.util.cores import shares

SIZES = {"2 KB": 2 << 10, "64 KB": 64 << 10, "1 MiB": 1 << 20}
"""Bytes of the whole, of one row."""
ROUNDS = {"barrier": 4000, "2 KB": 4000, "64 KB": 2000, "1 MiB": 500}


def timed(call: Callable[[], object], rounds: int) -> dict[str, float]:
    for _ in range(rounds // 10):
        call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1000)
    times.sort()
    return {
        "median_us": round(statistics.median(times), 2),
        "p99_us": round(times[rounds * 99 // 100], 2),
    }


def measure(group: Group) -> dict[str, dict[str, float]]:
    found = {"barrier": timed(group.barrier, ROUNDS["barrier"])}
    for name, size in SIZES.items():
        part = torch.zeros(1, size // 4, dtype=torch.bfloat16)
        first = group.rank * (size // 4)

        def gather(part: torch.Tensor = part, first: int = first, width: int = size // 2) -> object:
            return group.gather(part, first, width)

        found[name] = timed(gather, ROUNDS[name])
    return found


def rank(kind: str, number: int, descriptor: int, address: str) -> dict[str, dict[str, float]]:
    os.sched_setaffinity(0, shares(2)[number])
    torch.set_num_threads(1)
    group = create_group(
        kind, rank=number, size=2, timeout=60, descriptor=descriptor, address=address
    )
    found = measure(group)
    group.close()
    return found


def run(kind: str) -> dict[str, dict[str, float]]:
    address = "-"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if kind == "shared_memory":
            descriptor = create_memory(0)
        else:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            descriptor = os.dup(listener.fileno())
    theirs = descriptor if kind == "shared_memory" else -1
    command = [sys.executable, "-m", "bench.gather", "--rank", kind, str(theirs), address]
    passed = [theirs] if theirs >= 0 else []
    with subprocess.Popen(command, pass_fds=passed) as child:
        found = rank(kind, 0, descriptor, address)
        assert child.wait(60) == 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["shared_memory", "gloo"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        kind, descriptor, address = args.rank
        rank(kind, 1, int(descriptor), address)
        return
    record: dict[str, object] = {"record": run_record()}
    for kind in args.kinds:
        before = os.sched_getaffinity(0)
        record[kind] = found = run(kind)
        os.sched_setaffinity(0, before)
        for name, times in found.items():
            print(
                f"{kind:14} {name:8} median {times['median_us']:8.2f} us, p99 {times['p99_us']:8.2f} us"
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The processor cores of this process, and shares of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def default_threads(sharers: int = 1) -> int:
    """Compute threads: the physical cores that this process may use, but no more than the control group has
    time for, which is shared by `sharers` processes. (Threads beyond a container's CPU limit are stopped in
    turn, while the others wait for them at a barrier.)"""
    cores, limit = len(physical_cores()), quota()
    return cores if limit is None else max(1, min(cores, limit // sharers))


def quota() -> int | None:
    """Whole cores of time that the control group may use, at least 1; None without a limit."""
    try:
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (CONTROL_GROUP / f"cpu/cpu.cfs_{name}_us").read_text()
                for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        limit = int(quota) // int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return max(1, limit) if int(quota) > 0 else None


def physical_cores() -> list[set[int]]:
    """The hyper-threads of each core that this process may use. Cores of a NUMA node follow each other."""
    allowed = os.sched_getaffinity(0)
    cores: dict[str, set[int]] = {}
    for cpu in sorted(allowed, key=lambda cpu: (_node_of(cpu), cpu)):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.setdefault(file.read(), set()).add(cpu)
        except OSError:
            return [{each} for each in sorted(allowed)]
    return list(cores.values())


def _node_of(cpu: int) -> int:
    """The NUMA node; 0 if the system does not say."""
    try:
        names = os.listdir(f"/sys/devices/system/cpu/cpu{cpu}")
    except OSError:
        return 0
    return next((int(name[4:]) for name in names if name[:4] == "node" and name[4:].isdigit()), 0)


def shares(count: int) -> list[set[int]]:
    """The cores, divided into `count` runs of neighbours, as equal as possible. With fewer cores than
    that, each share is one core, and some are the same."""
    cores = physical_cores()
    if len(cores) < count:
        return [cores[index % len(cores)] for index in range(count)]
    ends = [len(cores) * index // count for index in range(count + 1)]
    return [set().union(*cores[ends[i] : ends[i + 1]]) for i in range(count)]


@contextlib.contextmanager
def pinned(cpus: Collection[int] | None) -> Iterator[None]:
    """Threads and processes that this thread starts may use these cores only. None: no change."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

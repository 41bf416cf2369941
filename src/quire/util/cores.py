"""The processors of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator


def physical_cores(allowed: Iterable[int] | None = None) -> int:
    """The number of cores of these processors, by default those that this process may use; hyper-threads of
    one core count once."""
    cpus = os.sched_getaffinity(0) if allowed is None else allowed
    return len({_core_of(cpu) for cpu in cpus})


def shares_of_cores(count: int, allowed: Iterable[int] | None = None) -> list[list[int]]:
    """These processors divided among ranks: each has neighbours, of one NUMA node if it can be, and all
    hyper-threads of a core. With fewer cores than ranks, several have the same one."""
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0) if allowed is None else allowed):
        cores.setdefault((_node_of(cpu), _core_of(cpu)), []).append(cpu)
    groups = [cores[key] for key in sorted(cores)]
    shares = []
    for index in range(count):
        first = index * len(groups) // count
        last = max(first + 1, (index + 1) * len(groups) // count)
        shares.append(sorted(cpu for group in groups[first:last] for cpu in group))
    return shares


def _core_of(cpu: int) -> int:
    """The core's first processor."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return int(file.read().replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def _node_of(cpu: int) -> int:
    """The NUMA node; 0 if the system does not say."""
    try:
        names = os.listdir(f"/sys/devices/system/cpu/cpu{cpu}")
    except OSError:
        return 0
    return next((int(name[4:]) for name in names if name[:4] == "node" and name[4:].isdigit()), 0)


@contextlib.contextmanager
def pinned(cpus: Collection[int] | None) -> Iterator[None]:
    """Processes that this thread starts may use these processors only. None: no change."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

"""The group of the ranks of one stage."""

from __future__ import annotations

import os

from quire.config import EngineConfig
from quire.distributed.create import create_group
from quire.distributed.shared_memory import HALF_BYTES
from quire.executor.ranks import Meeting
from quire.kernels.cpu.group import HEADER
from quire.kernels.group import Group
from quire.runner.footprint import WorkerSpec, step_bytes


def size_memory(meeting: Meeting, config: EngineConfig, spec: WorkerSpec) -> None:
    """Give the memory that a stage's ranks share its size, before any of them joins. It is an upper limit:
    pages are taken as they are written."""
    if meeting.address:
        return
    data = 2 * step_bytes(config, spec.model, 4) + (64 << 20)
    os.ftruncate(meeting.descriptor, HEADER + 2 * HALF_BYTES + data)


def join(config: EngineConfig, number: int, meeting: Meeting) -> Group:
    """number: of the rank, of the whole replica. Raises `ConfigError` and `WorkerError`."""
    parallel = config.parallel
    return create_group(
        "gloo" if meeting.address else "shared_memory",
        rank=number % parallel.tensor_parallel_size,
        size=parallel.tensor_parallel_size,
        timeout=parallel.worker_timeout,
        descriptor=meeting.descriptor,
        address=meeting.address,
    )

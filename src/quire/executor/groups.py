"""The group of the ranks of one stage: where they meet, and how they exchange results."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from quire.config import EngineConfig
from quire.distributed.create import create_group
from quire.distributed.shared_memory import HALF_BYTES
from quire.errors import ConfigError
from quire.kernels.cpu.group import HEADER
from quire.kernels.group import Group
from quire.runner.footprint import WorkerSpec, step_bytes


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a rank needs to join."""

    kind: str
    """As in `create_group`."""
    address: str = ""
    descriptor: int = -1
    """Of the stage's memory, or at the stage's first rank of the socket that listens at the address."""

    def join(self, config: EngineConfig, number: int) -> Group | None:
        """number: of the rank, of the whole replica. Returns None if it is alone in its stage. Raises
        `ConfigError` and `WorkerError`."""
        parallel = config.parallel
        size = parallel.tensor_parallel_size
        if size == 1:
            return None
        if self.kind == "nccl":
            import torch

            torch.cuda.set_device(number)
        return create_group(
            self.kind,
            rank=number % size,
            size=size,
            timeout=parallel.worker_timeout,
            descriptor=self.descriptor,
            address=self.address,
        )


def arrange(config: EngineConfig, spec: WorkerSpec, memory: int) -> Meeting:
    """For the first rank of the last stage, before any other rank joins. memory: the descriptor of its
    stage's. Raises `ConfigError`."""
    parallel = config.parallel
    if parallel.tensor_parallel_size == 1 or (spec.device == "cpu" and parallel.nnodes == 1):
        # An upper limit: pages are taken as they are written.
        data = 2 * step_bytes(config, spec.model, 4) + (64 << 20)
        os.ftruncate(memory, HEADER + 2 * HALF_BYTES + data)
        return Meeting("shared_memory", descriptor=memory)
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            "tensor_parallel_size with pipeline_parallel_size works on the CPUs of one machine only; "
            "use one of the two."
        )
    host = "127.0.0.1" if parallel.nnodes == 1 else parallel.master_addr
    listening = socket.create_server((host, 0))
    address = f"{host}:{listening.getsockname()[1]}"
    return Meeting("nccl" if spec.device == "cuda" else "gloo", address, listening.detach())

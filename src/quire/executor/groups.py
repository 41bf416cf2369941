"""The group of the ranks of one stage: where they meet, and how they exchange results."""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass

from quire.config import EngineConfig
from quire.distributed.channel import SharedMemoryChannel, channel_bytes
from quire.distributed.create import create_group
from quire.distributed.shared_memory import HALF_BYTES
from quire.dtypes import element_bytes
from quire.kernels.cpu.group import HEADER
from quire.kernels.group import Channel, Channels, Group
from quire.runner.footprint import WorkerSpec, group_bytes


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a rank needs to join."""

    kind: str
    """As in `create_group`."""
    address: str = ""
    descriptor: int = -1
    """Of the stage's memory, or at the stage's first rank of the socket that listens at the address."""

    def join(self, config: EngineConfig, spec: WorkerSpec, number: int) -> Group | None:
        """spec: of the whole. number: of the rank, of the whole replica. Returns None if it is alone in its
        stage. Raises `ConfigError` and `WorkerError`."""
        parallel = config.parallel
        size = parallel.tensor_parallel_size
        if size == 1:
            return None
        if self.kind == "nccl":
            import torch

            torch.cuda.set_device(number)
        shared = self.kind == "shared_memory"
        return create_group(
            self.kind,
            rank=number % size,
            size=size,
            timeout=parallel.worker_timeout,
            descriptor=self.descriptor,
            address=self.address,
            name=f"stage {number // size}",
            area=Areas(config, spec).of_stage(number // size) if shared else None,
        )

    def connect(self, config: EngineConfig, spec: WorkerSpec, number: int) -> Channels | None:
        """To the same rank of the stages before and after; None if there is one stage."""
        parallel = config.parallel
        size, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        if stages == 1:
            return None
        areas = Areas(config, spec)

        def end(sender: int, *, sends: bool) -> Channel | None:
            if not 0 <= sender < (stages - 1) * size:
                return None
            numbers, timeout = (sender, sender + size), parallel.worker_timeout
            if self.kind == "shared_memory":
                return SharedMemoryChannel(
                    self.descriptor,
                    sends=sends,
                    slots=stages,
                    timeout=timeout,
                    numbers=numbers,
                    area=areas.of_channel(sender),
                )
            from quire.distributed.link_channel import LinkChannel

            return LinkChannel(
                self.address,
                sends=sends,
                slots=stages,
                timeout=timeout,
                numbers=numbers,
                descriptor=self.descriptor if size == 1 else -1,  # else the group serves the store
            )

        return Channels(end(number - size, sends=False), end(number, sends=True))


class Areas:
    """Where groups and channels are in the memory that all ranks of one machine share. The sizes are upper
    limits: pages are taken as they are written."""

    def __init__(self, config: EngineConfig, spec: WorkerSpec) -> None:
        parallel = config.parallel
        self._stages = parallel.pipeline_parallel_size
        data = group_bytes(config, spec.model, 4)
        alone = parallel.tensor_parallel_size == 1
        self._group = 0 if alone else _pages(HEADER + 2 * HALF_BYTES + data)
        step = config.scheduler.max_num_batched_tokens * spec.model.hidden_size
        self._channel = _pages(channel_bytes(self._stages, step * element_bytes(spec.dtype)))
        senders = parallel.world_size - parallel.tensor_parallel_size
        self.num_bytes = self._stages * self._group + senders * self._channel

    def of_stage(self, stage: int) -> range:
        return range(stage * self._group, (stage + 1) * self._group)

    def of_channel(self, sender: int) -> range:
        """sender: number of the rank."""
        first = self._stages * self._group + sender * self._channel
        return range(first, first + self._channel)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def arrange(
    config: EngineConfig, spec: WorkerSpec, memory: int, host: str | None = None
) -> Meeting:
    """For the first rank of the last stage, before any other rank joins. spec: of the whole. memory, host:
    see `Ranks`. Raises `ConfigError`."""
    parallel = config.parallel
    together = memory >= 0 and spec.device == "cpu" and parallel.nnodes == 1
    if together:
        os.ftruncate(memory, Areas(config, spec).num_bytes)
        return Meeting("shared_memory", descriptor=memory)
    host = host or ("127.0.0.1" if parallel.nnodes == 1 else parallel.master_addr)
    listening = socket.create_server((host, 0))
    address = f"{host}:{listening.getsockname()[1]}"
    return Meeting("nccl" if spec.device == "cuda" else "gloo", address, listening.detach())

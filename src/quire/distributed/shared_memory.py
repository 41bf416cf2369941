"""Ranks of one machine: a gather is a copy into memory that all of them map, and a barrier."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.group import HEADER, SharedGroup
from quire.kernels.cpu.library import GROUP_RANKS

HALF_BYTES = 4 << 20
"""Of each of the two buffers that `gather` uses in turn. Programs place their own in the data area."""


def create_memory(data_bytes: int) -> int:
    """The descriptor of memory for one group, for `pass_fds`; close it when all ranks have it. It has no
    name, and pages are taken as they are written, so that data_bytes may be an upper limit. Raises
    `ConfigError`."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"Ranks that share memory need Linux, this is {sys.platform}; use one device."
        )
    descriptor = os.memfd_create("quire-group")
    try:
        os.ftruncate(descriptor, HEADER + 2 * HALF_BYTES + data_bytes)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"No shared memory of {data_bytes} bytes for the ranks: {error.strerror}."
        ) from error
    return descriptor


class SharedMemoryGroup:
    """A `Group` of processes that have the descriptor of one memory, or of threads."""

    def __init__(
        self,
        descriptor: int,
        *,
        rank: int,
        size: int,
        timeout: float = 60.0,
        area: range | None = None,
    ) -> None:
        """descriptor: of `create_memory`; it may be closed afterwards. area: as in `SharedGroup`. timeout:
        seconds that another rank may be late. Raises `ConfigError`."""
        if size > GROUP_RANKS:
            raise ConfigError(f"{size} ranks are above {GROUP_RANKS}, the most that share memory.")
        self.rank, self.size = rank, size
        try:
            self.c_group = SharedGroup(
                descriptor,
                rank=rank,
                size=size,
                timeout=timeout,
                reserved=2 * HALF_BYTES,
                area=area,
            )
        except (BuildError, OSError) as error:
            raise ConfigError(f"Ranks cannot share memory: {error}.") from error
        self._turn = 0

    def gather(self, x: Tensor, first: int, width: int) -> Tensor:
        # A buffer is written again two barriers later, when every rank has copied it.
        size = x.element_size()
        mine = x.contiguous().view(torch.uint8)  # [T, count * size]
        whole = torch.empty(len(x), width, dtype=x.dtype)
        rows_at_once = HALF_BYTES // (width * size)
        if not rows_at_once:
            raise ConfigError(f"A row of {width * size} bytes is above {HALF_BYTES} in a gather.")
        for start in range(0, len(x), rows_at_once):
            rows = mine[start : start + rows_at_once]
            begin = self._turn * HALF_BYTES
            self._turn ^= 1
            buffer = self.c_group.reserved[begin : begin + len(rows) * width * size]
            buffer = buffer.view(len(rows), width * size)
            buffer[:, first * size : first * size + rows.shape[1]] = rows
            self.barrier()
            whole[start : start + rows_at_once].view(torch.uint8).copy_(buffer)
        return whole

    def barrier(self) -> None:
        self.c_group.barrier()

    def abort(self, message: str) -> None:
        """End every wait of every rank with a `WorkerError` of this message: for a watcher, from any
        thread. The first call's message counts."""
        self.c_group.abort(message)

    def close(self) -> None:
        self.c_group.close()

"""A channel between stages on one machine: `quire.kernels.group.Channel`."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.group import HEADER, SharedGroup


def channel_bytes(slots: int, slot_bytes: int) -> int:
    """Size of the memory of one channel on one machine, a file without a name (`os.memfd_create`). slots: as
    many steps may be sent and not yet received. slot_bytes: of the largest step; an upper limit, pages are
    taken as they are written."""
    return HEADER + slots * slot_bytes


class SharedMemoryChannel:
    """A ring of buffers in memory that both processes map, and what each has counted: written, or read."""

    def __init__(
        self,
        descriptor: int,
        *,
        sends: bool,
        slots: int,
        timeout: float = 60.0,
        numbers: tuple[int, int] = (0, 1),
        area: range | None = None,
    ) -> None:
        """descriptor: of the memory; it may be closed afterwards. area: as in `SharedGroup`. sends: whether
        this is the sender's end. timeout: seconds that the other rank may be late. numbers: of sender and
        receiver, for errors. Raises `ConfigError`."""
        area = range(os.fstat(descriptor).st_size) if area is None else area
        try:
            self._group = SharedGroup(
                descriptor,
                rank=0 if sends else 1,
                size=2,
                timeout=timeout,
                reserved=len(area) - HEADER,
                numbers=numbers,
                area=area,
            )
        except (BuildError, OSError) as error:
            raise ConfigError(f"Stages cannot share memory: {error}.") from error
        size = len(self._group.reserved) // slots
        self._slots = self._group.reserved[: slots * size].view(slots, size)
        self._count = 0
        self._kept = torch.empty(0, dtype=torch.uint8)

    def send(self, x: Tensor) -> None:
        self._group.wait(1, self._count + 1 - len(self._slots))
        data = x.contiguous().view(torch.uint8).flatten()
        self._slot()[: len(data)] = data
        self._count += 1
        self._group.post()

    def receive(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        size = num_rows * width * dtype.itemsize
        if size > len(self._kept):
            self._kept = torch.empty(size, dtype=torch.uint8)
        self._group.wait(0, self._count + 1)
        self._kept[:size] = self._slot()[:size]
        self._count += 1
        self._group.post()
        return self._kept[:size].view(dtype).view(num_rows, width)

    def abort(self, message: str) -> None:
        """End every wait at both ends with a `WorkerError` of this message. From any thread."""
        self._group.abort(message)

    def close(self) -> None:
        self._slots = torch.empty(0)
        self._group.close()

    def _slot(self) -> Tensor:
        return self._slots[self._count % len(self._slots)]

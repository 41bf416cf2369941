"""A rank's KV cache as bytes, for what moves blocks in and out (`quire.kvtransfer`).

A block's bytes are [part][k or v][head][bytes of the layout], with a part for each layer that a page has room
for. If its group has fewer layers here, the last parts are zeros: their memory may still hold what another
request computed in another group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import KVCache
from quire.kv_layout import KVLayout
from quire.kvtransfer.base import BlockBytes
from quire.runner.device import Device, Download


def open_memory(cache: KVCache, layout: KVLayout, device: Device | None) -> HostKV | DeviceKV:
    """layout: of this rank's layers. device: None for the CPU."""
    used = [len(group.layers) for group in layout.groups]
    parts = len(cache.parts)
    # A GPU copies words faster than bytes.
    items = cache.storage.view(torch.uint8 if device is None else torch.int32)
    blocks = items.view(parts, 2, cache.num_blocks, -1).permute(2, 0, 1, 3)
    return HostKV(blocks.numpy(), used) if device is None else DeviceKV(blocks, used, device)


PIECE_BYTES, MOST_PIECES = 32 << 20, 4
"""Of a snapshot on a device, so many pieces are copied to the host at a time: until then they take memory
there that the cache does not have. The thread that launches plans waits for what is beyond them."""


class Complete:
    """A `Snapshot` that was complete at once."""

    def wait(self) -> None:
        pass


class HostKV:
    """A `KVMemory` of the CPU, where a plan is over when the next one is launched."""

    def __init__(self, blocks: NDArray[np.uint8], used: Sequence[int]) -> None:
        """blocks: [num_blocks, parts, 2, n], any strides but the last dimension's. used: by group, the
        number of its parts."""
        self._blocks, self._used = blocks, used
        self._shape = blocks.shape[1:]
        self.block_bytes = int(np.prod(self._shape))

    def mark(self) -> object:
        return None

    def read(
        self, block_ids: Sequence[int], groups: Sequence[int], out: Sequence[BlockBytes]
    ) -> Complete:
        blocks, shape = self._blocks, self._shape
        for index, group, row in zip(block_ids, groups, out, strict=True):
            used, target = self._used[group], row.reshape(shape)
            target[:used] = blocks[index, :used]
            target[used:] = 0
        return Complete()

    def write(self, block_ids: Sequence[int], data: NDArray[np.uint8], after: object) -> None:
        for index, row in zip(block_ids, data.reshape(-1, *self._shape), strict=True):
            self._blocks[index] = row


class DeviceKV:
    """A `KVMemory` of an accelerator. Blocks are gathered in the order of launches and copied to the host
    beside later ones. Loaded blocks are written beside the steps that were launched after the mark.

    Tested with the CPU in the device's place only, like everything for GPUs (docs/gpu.md)."""

    def __init__(self, blocks: Tensor, used: Sequence[int], device: Device) -> None:
        """blocks: [num_blocks, parts, 2, n] int32. used: as in `HostKV`."""
        self._blocks, self._used, self._device = blocks, used, device
        self._shape = blocks.shape[1:]
        self.block_bytes = self._shape.numel() * blocks.itemsize

    def mark(self) -> object:
        with self._device.active():
            return self._device.mark()

    def read(
        self, block_ids: Sequence[int], groups: Sequence[int], out: Sequence[BlockBytes]
    ) -> DeviceSnapshot:
        snapshot, most = DeviceSnapshot(), max(1, PIECE_BYTES // self.block_bytes)
        with self._device.active(), torch.inference_mode():
            for start in range(0, len(block_ids), most):
                snapshot.wait(MOST_PIECES - 1)
                piece = slice(start, start + most)
                gathered = self._blocks[self._ids(block_ids[piece])]
                for row, group in zip(gathered, groups[piece], strict=True):
                    if self._used[group] < len(row):
                        row[self._used[group] :].zero_()
                snapshot.pieces.append((self._device.download([gathered]), out[piece]))
        return snapshot

    def write(self, block_ids: Sequence[int], data: NDArray[np.uint8], after: object) -> None:
        def launch() -> None:
            shape = (len(block_ids), *self._shape)
            rows = torch.empty(shape, dtype=torch.int32, device=self._blocks.device)
            self._device.upload(rows, torch.from_numpy(data).view(torch.int32).view(shape))
            self._blocks[self._ids(block_ids)] = rows

        with torch.inference_mode():
            self._device.beside(after, launch)

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        ids = torch.empty(len(block_ids), dtype=torch.int64, device=self._blocks.device)
        self._device.upload(ids, torch.tensor(block_ids, dtype=torch.int64))
        return ids


@dataclass(slots=True)
class DeviceSnapshot:
    """A `Snapshot`."""

    pieces: deque[tuple[Download, Sequence[BlockBytes]]] = field(default_factory=deque)
    """Those that are not complete."""
    lock: Lock = field(default_factory=Lock)
    """The rows may be another snapshot's once one caller knows that this one is complete."""

    def wait(self, left: int = 0) -> None:
        """Until no more than so many pieces are incomplete."""
        with self.lock:
            while len(self.pieces) > left:
                download, out = self.pieces[0]
                (rows,) = download.wait()
                data = rows.flatten(1).view(torch.uint8).numpy()
                for target, row in zip(out, data, strict=True):
                    target[:] = row
                self.pieces.popleft()

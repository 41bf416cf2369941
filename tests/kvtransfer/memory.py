"""A tier and a cache in memory, and what can be made to go wrong with them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.kvtransfer.base import BlockBytes
from quire.messages import BlockName, KVSource

BLOCK_BYTES = 64


def name_of(number: int, group: int = 0) -> BlockName:
    return (number.to_bytes(32, "big"), group)


def bytes_of(name: BlockName, size: int = BLOCK_BYTES) -> BlockBytes:
    """What the tests put under a name."""
    seed = int.from_bytes(name[0], "big") * 7 + name[1]
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class DictTier:
    """A `Tier` without limits. `gate`, if set, is called before each read and write."""

    def __init__(self, label: str = "ram") -> None:
        self.label = label
        self.blocks: dict[BlockName, BlockBytes] = {}
        self.gate: Callable[[str], None] | None = None
        self.closed = False
        self.counts: Counter[str] = Counter()
        self.is_on = True
        self.capacity = 1 << 30

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.blocks.values()))

    def __len__(self) -> int:
        return len(self.blocks)

    def has(self, name: BlockName) -> bool:
        return name in self.blocks

    def put(self, name: BlockName, data: BlockBytes) -> bool:
        if self.gate is not None:
            self.gate("put")
        self.blocks.setdefault(name, data.copy())
        return True

    def get(self, name: BlockName, out: BlockBytes) -> bool:
        if self.gate is not None:
            self.gate("get")
        found = self.blocks.get(name)
        if found is not None:
            out[:] = found
        return found is not None

    def clear(self) -> None:
        self.blocks.clear()

    def close(self) -> None:
        self.closed = True


class Copied:
    def wait(self) -> None:
        pass


class Cache:
    """A `KVMemory`."""

    def __init__(self, num_blocks: int, size: int = BLOCK_BYTES) -> None:
        self.blocks = np.zeros((num_blocks, size), dtype=np.uint8)
        self.block_bytes = size
        self.marks = 0

    def mark(self) -> object:
        self.marks += 1
        return self.marks

    def read(
        self, block_ids: Sequence[int], groups: Sequence[int], out: Sequence[BlockBytes]
    ) -> Copied:
        for index, row in zip(block_ids, out, strict=True):
            row[:] = self.blocks[index]
        return Copied()

    def write(self, block_ids: Sequence[int], data: NDArray[np.uint8], after: object) -> None:
        assert isinstance(after, int) and len(block_ids) == len(data)
        self.blocks[list(block_ids)] = data


class DictPeers:
    """`Peers` that have some names. `gate`, if set, is waited for in each fetch."""

    def __init__(self, names: Sequence[BlockName]) -> None:
        self.names = set(names)
        self.gate: threading.Event | None = None
        self.asked: list[list[BlockName]] = []
        self.ended: list[str] = []
        self.closed = False

    def fetch(
        self,
        source: KVSource,
        names: Sequence[BlockName],
        out: NDArray[np.uint8],
        timeout: float,
    ) -> int:
        self.asked.append(list(names))
        if self.gate is not None:
            self.gate.wait(30)
        for count, (name, row) in enumerate(zip(names, out, strict=True)):
            if name not in self.names:
                return count
            row[:] = bytes_of(name, len(row))
        return len(names)

    def done(self, source: KVSource) -> None:
        self.ended.append(source.ticket)

    def close(self) -> None:
        self.closed = True
        if self.gate is not None:
            self.gate.set()

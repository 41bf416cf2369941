"""A block's bytes are the layout's, part by part, and come back to the same places."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention.base import KVCache
from quire.kv_layout import KVGroup, KVLayout
from quire.runner import kv_memory
from quire.runner.device import HostDevice
from quire.runner.kv_memory import DeviceKV, HostKV, open_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
LAYOUT = KVLayout((KVGroup((0, 2, 4)), KVGroup((1, 3), 32), KVGroup((), 32)), layer_size=24)
"""The second group uses two of three parts; the third has no layer in this stage."""
BLOCKS = [7, 2, 5]


class LateDevice(HostDevice):
    """A download reads as late as it may, so that it finds what a later step has written there."""

    def __init__(self) -> None:
        self.num_launched = 0
        self.marks: list[object] = []

    def download(self, tensors: Sequence[Tensor]) -> LateDownload:
        return LateDownload(tensors)

    def mark(self) -> object:
        return self.num_launched

    def beside(self, after: object, work: Callable[[], None]) -> None:
        self.marks.append(after)
        work()


class LateDownload:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def wait(self) -> Sequence[Tensor]:
        return [tensor.clone() for tensor in self.tensors]


def make_cache(dtype: torch.dtype) -> KVCache:
    cache = KVCache(
        num_parts=3, num_blocks=9, num_kv_heads=3, head_dim=4, block_size=16, dtype=dtype
    )
    cache.storage.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(1))
    return cache


def expected(cache: KVCache, block: int, used: int) -> np.ndarray:
    """[part][k or v][head][bytes], read from the layers' own tensors."""
    rows = []
    for number, part in enumerate(cache.parts):
        for side in (part.k, part.v):
            for head in range(3):
                row = side[block, head].contiguous().view(torch.uint8).flatten().numpy()
                rows.append(row if number < used else np.zeros_like(row))
    return np.concatenate(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [False, True])
def test_blocks_come_back_with_the_same_bytes(dtype: torch.dtype, on_device: bool) -> None:
    device = LateDevice() if on_device else None
    cache, other = make_cache(dtype), make_cache(dtype)
    memory = open_memory(cache, LAYOUT, device)
    assert isinstance(memory, DeviceKV if on_device else HostKV)
    out = np.full((3, memory.block_bytes), 99, dtype=np.uint8)
    wanted = [expected(cache, b, used) for b, used in zip(BLOCKS, (3, 2, 0), strict=True)]
    snapshot = memory.read(BLOCKS, [0, 1, 2], list(out))
    cache.storage.view(torch.uint8).zero_()  # a later step
    snapshot.wait()
    snapshot.wait()
    for row, want in zip(out, wanted, strict=True):
        assert (row == want).all()

    before = other.storage.view(torch.uint8).clone()
    memory = open_memory(other, LAYOUT, device)
    mark = memory.mark()
    if device is not None:
        device.num_launched += 1
    memory.write([1, 8, 0], out, mark)
    if device is not None:
        assert device.marks == [0]  # it does not wait for what was launched later
    for block, want in zip([1, 8, 0], wanted, strict=True):
        assert (expected(other, block, 3) == want).all()
    kept = [block for block in range(9) if block not in (1, 8, 0)]
    after = other.storage.view(torch.uint8).view(3, 2, 9, -1)
    assert torch.equal(after[:, :, kept], before.view(3, 2, 9, -1)[:, :, kept])


def test_once_a_snapshot_is_complete_nobody_fills_its_rows_any_more() -> None:
    """Two threads wait for it, and the first of them gives the row to another block."""
    cache, gate, begun = make_cache(torch.float32), threading.Event(), threading.Semaphore(0)

    class Held(LateDownload):
        def wait(self) -> Sequence[Tensor]:
            begun.release()
            assert gate.wait(20)
            return super().wait()

    device = LateDevice()
    device.download = Held  # type: ignore[method-assign, assignment]
    memory = open_memory(cache, LAYOUT, device)
    out = np.zeros((1, memory.block_bytes), dtype=np.uint8)
    snapshot = memory.read([3], [0], list(out))

    def use() -> None:
        snapshot.wait()
        out[:] = 77

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=20)
    assert not begun.acquire(timeout=0.05), "the second waits for the first"
    gate.set()
    for thread in threads:
        thread.join()
    assert (out == 77).all()


def test_a_large_snapshot_takes_little_memory_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, under_way, most = make_cache(torch.float32), [], []

    class Counted(LateDownload):
        def __init__(self, tensors: Sequence[Tensor]) -> None:
            super().__init__(tensors)
            under_way.append(self)
            most.append(sum(tensor.nbytes for each in under_way for tensor in each.tensors))

        def wait(self) -> Sequence[Tensor]:
            under_way.remove(self)
            return super().wait()

    device = LateDevice()
    device.download = Counted  # type: ignore[method-assign, assignment]
    memory = open_memory(cache, LAYOUT, device)
    size = memory.block_bytes
    monkeypatch.setattr(kv_memory, "PIECE_BYTES", 2 * size)
    monkeypatch.setattr(kv_memory, "MOST_PIECES", 2)
    out = np.zeros((9, size), dtype=np.uint8)
    snapshot = memory.read(range(9), [0] * 9, list(out))
    wanted = [expected(cache, block, 3) for block in range(9)]
    cache.storage.view(torch.uint8).zero_()
    snapshot.wait()
    assert (out == np.stack(wanted)).all()
    assert max(most) == 4 * size and not under_way

"""Memory that is asked for ahead of its use."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from quire.kernels.memory import large_zeros, reserve_in_background

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's memory management")
def test_reserving_provides_the_pages_and_keeps_the_content() -> None:
    tensor = large_zeros((96 * MIB,), torch.uint8)
    tensor[1000] = 7
    before = resident_bytes()
    reserve_in_background(tensor)
    for thread in threading.enumerate():
        if thread.name == "quire-reserve":
            thread.join(timeout=60)
    assert resident_bytes() - before > 80 * MIB
    assert tensor[1000] == 7 and int(tensor.sum()) == 7


def test_small_and_empty_tensors() -> None:
    for size in (0, 1, 5000, 200_000):
        tensor = large_zeros((size,), torch.float32)
        reserve_in_background(tensor)
        assert tensor.shape == (size,) and not tensor.any()

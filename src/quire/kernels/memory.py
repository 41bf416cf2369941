"""Large tensors on huge pages.

A decode step streams every weight once. On 4 KiB pages that is a TLB miss every 64 cache lines, and the
hardware's prefetchers stop at each page's end; on 2 MiB pages neither is felt.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

HUGE_PAGE_BYTES = 2 << 20


def large_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.zeros`. Memory is taken from the system as it is touched, 2 MiB at a time."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)

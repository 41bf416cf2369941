"""Large tensors: on huge pages, and copied by one thread.

A decode step streams every weight once. On 4 KiB pages that is a TLB miss every 64 cache lines, and the
hardware's prefetchers stop at each page's end; on 2 MiB pages neither is felt.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

MIN_BYTES = 128 << 10
"""Less is not streamed, and the allocator has it in a pool."""


def large_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.zeros`. Memory is taken from the system as it is touched, 2 MiB at a time.

    A tensor need not be of whole huge pages, nor begin at one: the system places what is asked for in a
    row side by side and joins it, so a huge page may hold the end of one matrix and the beginning of
    the next.
    """
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if num_bytes < MIN_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """As `target.copy_(source)`, in this thread alone when there is nothing to convert: PyTorch would start
    a team of OpenMP threads for each thread that copies.
    """
    if source.dtype is target.dtype and source.is_contiguous() and target.is_contiguous():
        assert source.shape == target.shape, (source.shape, target.shape)
        target.view(torch.uint8).numpy()[:] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source)

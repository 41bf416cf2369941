"""Large tensors: on huge pages, reserved in advance, and copied by one thread.

A decode step reads every weight once. With pages of 4 KiB there is a TLB miss every 64 cache lines, and the
hardware's prefetchers stop at each page's end. With pages of 2 MiB both are rare.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

MIN_BYTES = 128 << 10
"""Smaller tensors come from the allocator's pool."""


MADV_POPULATE_WRITE = 23  # linux/mman.h
RESERVED_AT_ONCE = 8 << 20


def large_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.zeros`. Memory is taken from the system as it is touched, 2 MiB at a time.

    A tensor need not begin or end at a huge page: the system places consecutive mappings side by side and
    joins them, so a huge page may hold the end of one matrix and the beginning of the next.
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
    except OSError:  # a Linux kernel without huge pages
        pass
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def reserve_in_background(tensor: torch.Tensor) -> None:
    """Let the system allocate a tensor's pages now, in a thread, and not at their first use.

    Contents do not change, so the tensor may be in use. On Linux before 5.14, pages are allocated at
    their first use. The thread holds the tensor until it is done.
    """
    if not sys.platform.startswith("linux"):
        return

    def populate() -> None:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // page) * page
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        for start in range(begin, end - page, RESERVED_AT_ONCE):
            size = min(RESERVED_AT_ONCE, (end - start) // page * page)
            if libc.madvise(start, size, MADV_POPULATE_WRITE) != 0:
                return

    threading.Thread(target=populate, name="quire-reserve", daemon=True).start()


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """As `target.copy_(source)`, but only in this thread if no dtype must be converted: PyTorch would
    start a team of OpenMP threads for each thread that copies.
    """
    if source.dtype is target.dtype and source.is_contiguous() and target.is_contiguous():
        assert source.shape == target.shape, (source.shape, target.shape)
        target.view(torch.uint8).numpy()[:] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source)

"""`quire.speculative.lookup` in C (lookup.c)."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int32, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from quire.kernels.cpu.library import load_library


class TextIndex(ctypes.Structure):
    """Mirrors text_index in lookup.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "owners", "links", "heads")),
        *((name, c_int64) for name in ("mask", "bucket_bits", "count", "floor")),
    ]


class LookupJob(ctypes.Structure):
    """Mirrors lookup_job in lookup.c."""

    _fields_ = [
        ("own", TextIndex),
        ("shared", c_void_p),
        *((name, c_int64) for name in ("token_stride", "bucket_stride")),
        *((name, c_void_p) for name in ("indexed", "owners", "tasks", "drafts", "counts")),
        *((name, c_int64) for name in ("num_tasks", "most", "anchor", "depth")),
        ("votes", c_int32),
        *((name, c_double) for name in ("factor", "least")),
    ]


def look_up(job: LookupJob) -> None:
    load_library().quire_lookup(byref(job))


def add_text(index: TextIndex, text: NDArray[np.int64], owner: int, anchor: int) -> None:
    load_library().quire_lookup_add(byref(index), text.ctypes.data, len(text), owner, anchor)

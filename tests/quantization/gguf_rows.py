"""Rows of every GGUF type, of bytes that follow from their names alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from quire.kernels.dequantize import dequantize
from quire.kernels.fields import spread
from quire.quantization.gguf import FORMATS
from quire.quantization.gguf_blocks import PACKED, read_scales
from quire.quantization.gguf_types import BLOCKS

HALVES = {"q2_K": (80, 82), "q3_K": (108,), "q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,),
          "q4_1": (0, 2), "q5_1": (0, 2), "mxfp4": ()}  # fmt: skip
"""Where a block has its float16 numbers, if not at 0 alone."""
SHAPES = [(1, 1), (5, 3), (67, 2)]
"""Rows, and blocks in a row."""


def random_bytes(seed: str, count: int) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_128(seed.encode()).digest(count), dtype=np.uint8).copy()


def raw_rows(kind: str, rows: int, blocks: int) -> NDArray[np.uint8]:
    """[rows, bytes of a row]. Every code and integer scale may occur; scales are below 2."""
    size = BLOCKS[kind].bytes
    data = random_bytes(f"{kind} {rows} {blocks}", rows * blocks * size).reshape(-1, size)
    for at in HALVES.get(kind, (0,)):
        data[:, at + 1] &= 0xBF  # the exponent's highest bit
    if kind == "mxfp4":
        data[:, 0] &= 0x7F
    return data.reshape(rows, blocks * size)


def values(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """[N, bytes of a row] -> [N, K] float32"""
    return dequantize(FORMATS[kind], spread(PACKED[kind], raw), read_scales(kind, raw))

"""The shapes of tiles, by what the compiled kernel depends on and by nothing that a batch decides.

A tile's shape fixes the order in which numbers are summed, so a result is the same bits in every batch
only if the shape is a function of the model, the cache and the device. Nothing is tuned while serving:
`TABLE` is filled offline, by measuring, and what it lacks follows `_default`. Those defaults are from
ahead-of-time compiles (no spills, wgmma on sm_90 for prefill, shared memory for two programs a
multiprocessor in decode); none has been measured on a device yet.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton

Regime = Literal["decode", "prefill", "invariant"]
"""decode: few query tokens a request, keys cut into splits. prefill: the rest. invariant: one shape for
both, so that they agree bit for bit."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a choice may depend on. arch: 80, 90, 100; 0 for what is not from Nvidia."""

    arch: int
    head_dim: int
    group: int
    block_size: int
    dtype: torch.dtype  # of the cache
    regime: Regime


@dataclass(frozen=True, slots=True)
class Tile:
    """block_m: query rows (tokens times heads of a group); in decode a lower bound. block_n: keys a
    step. split: keys in the first splits of a request, a multiple of block_n. per_level: splits of one size
    before the size doubles. tma: keys and values by the bulk tensor copy engine; for sm_90 and later, with
    blocks of block_n keys or a multiple. fused: the program that ends last merges the splits of its request
    and head, instead of a kernel of its own; the bits are the same.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: int = 256
    per_level: int = 16
    tma: bool = False
    fused: bool = True


TABLE: dict[Key, Tile] = {}
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "prefill": (
        Tile(128, 128, warps=8, stages=2),
        Tile(64, 64, warps=4, stages=2),
        Tile(128, 64, warps=8, stages=2),
    ),
    "decode": (
        Tile(16, 64, warps=4, stages=3, fused=False),
        Tile(16, 64, warps=4, stages=3, per_level=8),
        Tile(16, 64, warps=4, stages=3, split=128, per_level=32),
        Tile(64, 64, warps=4, stages=2),
        Tile(64, 32, warps=4, stages=3),
    ),
}
"""What the first device run measures against `_default`, for heads of 128 on sm_90 (`bench.gpu first`). All
compile without spills. None is used before it has won there."""


def tile(key: Key) -> Tile:
    return TABLE.get(key) or _default(key)


def _default(key: Key) -> Tile:
    wide = key.head_dim > 128
    if key.dtype is torch.float32:  # no tensor cores: products in full float32
        return Tile(16, 32, warps=8, stages=2)
    large = has_large_shared_memory(key.arch) and key.arch >= 90
    if key.regime == "decode":
        if key.arch // 10 == 9 and key.dtype is torch.float8_e4m3fn and not wide:
            # wgmma, which takes 64 rows: with 16, values of 8 bits are read from shared memory one by one.
            return Tile(64, 64, warps=4, stages=3)
        # Where shared memory is 64 KiB, two stages let two programs share a multiprocessor.
        return Tile(16, 32 if wide else 64, warps=4, stages=3 if key.arch else 2)
    if key.regime == "invariant":
        return Tile(32, 32, warps=8, stages=2) if wide else Tile(64, 64, warps=8, stages=2)
    if large:  # wgmma or its successor
        return Tile(128, 32, warps=8, stages=2) if wide else Tile(128, 64, warps=8, stages=3)
    return Tile(64 if wide else 128, 32, warps=8, stages=2)


def has_large_shared_memory(arch: int) -> bool:
    """Whether a program may use 160 KiB: the data-centre GPUs of compute capability 8.0, 8.7, 9, 10 and 11.
    Others have 99 KiB (8.6, 8.9, 12), or 64 KiB (AMD's gfx942)."""
    return arch in (80, 87) or arch // 10 in (9, 10, 11)


@functools.cache
def architecture() -> int:
    """`Key.arch` of the device that kernels are launched on."""
    if triton.knobs.runtime.interpret:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0

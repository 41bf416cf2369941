"""x @ weight.T + bias, in which a row has the same bits in every batch: the product of `--batch-invariant`.

cuBLAS chooses tiles, the order of sums and whether to split them by the number of rows. Here one output
is one chain of products over k, in steps of one size, added in float32 by one kind of instruction, for
one row or ten thousand. So the tile depends on the dtype alone. The number of rows is a plain integer
argument, for which the compiler does not specialize. It is used for masks and to assign tiles to
programs; the rows of a tile are independent.

Why not smaller tiles for fewer rows: half the rows need another instruction (on sm_90, wgmma needs 64),
and it is not documented that it adds in the same order. A decode step is bound by reading the weight,
which empty rows of a tile do not slow down, because masked loads are not issued.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import FLOATS, KernelArgumentError, require
from quire.kernels.triton.tuning import architecture, has_large_shared_memory

ALIGNMENT = 16
"""Bytes of a thread's widest load. Tensors must begin at a multiple: the compiled code depends on it."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of x, rows of the weight, and the part of k in one iteration."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


HALF = Tile(128, 128, 64, warps=8, stages=6)  # 160 KiB of shared memory
NARROW = Tile(64, 32, 64, warps=4, stages=6)
"""Four times as many programs at few rows. Used if a device gives it the bits of `HALF`, which `bench.gpu
first` finds out; until then by nothing."""
FLOAT32 = Tile(32, 64, 32, warps=8, stages=2)  # no tensor cores: products in full float32
GROUP = 8
"""Tiles of rows that read the weight at the same time, so that it is read from memory once and then from
L2."""


@triton.jit(do_not_specialize=["M"])
def _matmul(
    out_ptr, x_ptr, weight_ptr, bias_ptr, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x: [M, K], weight: [N, K], bias: [N] or None, out: [M, N]. Grid: tiles."""
    per_group: tl.constexpr = GROUP * tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // per_group
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    first_m = (group * GROUP + tl.program_id(0) % per_group % height) * BLOCK_M
    first_n = tl.program_id(0) % per_group // height * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_inside, n_inside = m < M - first_m, n < N - first_n
    # Offsets inside a tile fit in 32 bits; offsets of tiles may not.
    x_ptr += first_m.to(tl.int64) * K + m[:, None] * K + k[None, :]
    weight_ptr += first_n.to(tl.int64) * K + n[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k_inside = k < K - start
        x = tl.load(x_ptr + start, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + start, mask=n_inside[None, :] & k_inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_n + n, mask=n_inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_ptr += first_m.to(tl.int64) * N + first_n + m[:, None] * N + n[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


def half_tile(arch: int) -> Tile:
    """For 16-bit numbers. The stages are those for which shared memory suffices; they change no bit."""
    if has_large_shared_memory(arch):
        return HALF
    return replace(HALF, stages=3 if arch else 2)  # 96 KiB; 64 KiB


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """x: [M, K], weight: [N, K], bias: [N], contiguous, of one dtype. Returns [M, N], each rounded once.
    tile: for measurements."""
    require(x.dtype in FLOATS, f"x is {x.dtype}; need float32, bfloat16 or float16")
    require(
        x.dim() == weight.dim() == 2, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; need 2-D"
    )
    (rows, k), n = x.shape, weight.shape[0]
    _check("x", x, x.dtype, (rows, k))
    _check("weight", weight, x.dtype, (n, k))
    if bias is not None:
        _check("bias", bias, x.dtype, (n,))
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if tile is None:
        tile = FLOAT32 if x.dtype is torch.float32 else half_tile(architecture())
    if rows:
        _matmul[(triton.cdiv(rows, tile.m) * triton.cdiv(n, tile.n),)](
            out, x, weight, bias, rows,
            N=n, K=k, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (
        x.dtype is not dtype
        or x.shape != shape
        or not x.is_contiguous()
        or x.data_ptr() % ALIGNMENT
    ):
        raise KernelArgumentError(
            f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} from address "
            f"{x.data_ptr():#x}; need {dtype} {shape}, contiguous, from a multiple of {ALIGNMENT}"
        )

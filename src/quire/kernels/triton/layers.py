"""Everything between the matrix products except attention and sampling: the `Kernels` of
`kernels/base.py`, on tensors of a GPU.

A decode step of a small model launches hundreds of kernels of a few microseconds each, so the work
between two products is one launch: the residual addition with the norm after it, or the norms of heads
with the rotation and the write to the cache.

A row's bits do not depend on the batch: one program reduces a whole row (or a whole head), and its order
of summation follows from the compiled layout. This depends on the width, the stride between tokens, the
dtype and the alignment, and not on the batch. Strides are compile-time constants, and a tensor must start
on 16 bytes, so that a slice cannot change the layout.

Contents are not checked: a position outside `cos_sin`, an id outside the vocabulary or a slot outside the
cache reads or writes arbitrary memory. Rounding is as in `kernels/base.py`: to the tensor's dtype where
Hugging Face's modules round, in float32 otherwise.
"""

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.base import Activation
from quire.kernels.checks import (
    FLOATS,
    KernelArgumentError,
    check_activation,
    check_divisor_and_cap,
)

MAX_WIDTH = 16384
"""Width of the widest row that one program keeps in registers."""
ALIGNMENT = 16
"""Bytes of a thread's widest load."""

# --- norms and the embedding ------------------------------------------------------------------------


@triton.jit
def _normed(x, weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """x: float32, zero past WIDTH. It is rounded to the weight's dtype before the multiplication by the
    weight."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return ((x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, eps,
    HEADS: tl.constexpr, STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    token, first = row // HEADS, row % HEADS * WIDTH
    x = tl.load(x_ptr + token * STRIDE + first + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = _normed(x, weight, eps, WIDTH, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * OUT_STRIDE + first + column, normed, mask=inside)


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * WIDTH + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    total = (residual.to(tl.float32) + x).to(dtype)
    tl.store(residual_ptr + row * WIDTH + column, total, mask=inside)
    normed = _normed(total.to(tl.float32), weight, eps, WIDTH, dtype)
    tl.store(out_ptr + row * WIDTH + column, normed, mask=inside)


@triton.jit
def _embed(ids_ptr, table_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    token_id = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + token_id * WIDTH + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, x, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`Kernels.rms_norm`. x, out: [T, H] or [T, heads, H]."""
    if x.dim() not in (2, 3):
        raise KernelArgumentError(f"x has shape {tuple(x.shape)}; need [T, H] or [T, heads, H]")
    stride = _check_norm(x, weight)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _check_rows("out", out, x.dtype, x.shape)
    heads, width = x.shape[1:-1].numel(), x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x.shape[0] * heads,)](
        x, weight, out, eps,
        HEADS=heads, STRIDE=stride, OUT_STRIDE=_stride(out), WIDTH=width, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """`Kernels.add_rms_norm`. x, residual, out: [T, H]; out may be x."""
    out = _out_like(x.shape, x, out)
    stride = _check_norm(x, weight)
    _check_dense("residual", residual, x.dtype, x.shape)
    block = triton.next_power_of_2(x.shape[1])
    _add_rms_norm[(x.shape[0],)](
        x, residual, weight, out, eps,
        STRIDE=stride, WIDTH=x.shape[1], BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def embedding(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of a table. ids: [T] int32 or int64. table: [V, H]. Returns [T, H]."""
    width = table.shape[-1]
    out = _out_like((*ids.shape, width), table, out)
    _check_ids("ids", ids, ids.shape[:1])
    _check_dense("table", table, table.dtype, (table.shape[0], width))
    block = triton.next_power_of_2(width)
    _embed[(ids.shape[0],)](ids, table, out, WIDTH=width, BLOCK=block, num_warps=_warps(block))
    return out


# --- element by element -----------------------------------------------------------------------------

_BLOCK = (
    1024  # there is no sum, so a block need not be a row: one token's 14336 columns are 14 programs
)


@triton.jit
def _gated(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_ptr = gate_up_ptr + row * (2 * WIDTH) + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    logit = gate
    if GELU:
        # gate * (1 + tanh(y)) / 2 with y = sqrt(2 / pi) (...); (1 + tanh(y)) / 2 is the logistic
        # function of 2 y, which loses no digits where tanh(y) is near -1.
        logit = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    activated = (gate / (1.0 + tl.exp(-logit))).to(out_ptr.dtype.element_ty)
    product = (activated.to(tl.float32) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + column, product, mask=inside)


def gated(gate_up: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """`Kernels.gated`. gate_up: [T, 2F], gate first. Returns [T, F]."""
    check_activation(activation, get_args(Activation))
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise KernelArgumentError(f"gate_up has shape {tuple(gate_up.shape)}; need [T, 2F]")
    _check_float("gate_up", gate_up)
    _check_dense("gate_up", gate_up, gate_up.dtype, gate_up.shape)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _out_like((tokens, width), gate_up, out)
    _gated[(tokens, triton.cdiv(width, _BLOCK))](
        gate_up, out, WIDTH=width, GELU=activation == "gelu_tanh", BLOCK=_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _add(x_ptr, residual_ptr, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + at, mask=column < WIDTH).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=column < WIDTH).to(tl.float32)
    total = residual + (x * scale).to(dtype).to(tl.float32)
    tl.store(residual_ptr + at, total.to(dtype), mask=column < WIDTH)


@triton.jit
def _scale(
    x_ptr, positions_ptr, table_ptr, factor,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if table_ptr is not None:
        factor = tl.load(table_ptr + tl.load(positions_ptr + row).to(tl.int64))
    x_ptr += row * STRIDE + column
    x = tl.load(x_ptr, mask=column < WIDTH).to(tl.float32) * factor
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), which cancels near 0: there five terms of the series."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    square = x * x
    series = -1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))
    return tl.where(magnitude < 0.25, x + x * square * series, large)


@triton.jit
def _finish_logits(
    logits_ptr, divisor, cap, CAPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.div_rn(tl.load(logits_ptr, mask=column < WIDTH).to(tl.float32), divisor).to(dtype)
    if CAPPED:
        x = tl.div_rn(x.to(tl.float32), cap).to(dtype)
        x = _tanh(x.to(tl.float32)).to(dtype)
        x = (x.to(tl.float32) * cap).to(dtype)
    tl.store(logits_ptr, x, mask=column < WIDTH)


def add(x: Tensor, residual: Tensor, *, scale: float = 1.0) -> None:
    """`Kernels.add`. x, residual: [T, H]."""
    grid = _check_matrix("x", x)
    _check_dense("x", x, x.dtype, x.shape)
    _check_dense("residual", residual, x.dtype, x.shape)
    _add[grid](x, residual, scale, WIDTH=x.shape[1], BLOCK=_BLOCK, num_warps=4)


def scale(x: Tensor, factor: float) -> None:
    """`Kernels.scale`. x: [T, N], any token stride."""
    _launch_scale(x, None, None, factor)


def scale_by_position(x: Tensor, positions: Tensor, table: Tensor) -> None:
    """`Kernels.scale_by_position`. x: [T, N], any token stride. positions: [T] int32 or int64."""
    _check_ids("positions", positions, x.shape[:1])
    _check_dense("table", table, torch.float32, (table.numel(),))
    _launch_scale(x, positions, table, 1.0)


def _launch_scale(x: Tensor, positions: Tensor | None, table: Tensor | None, factor: float) -> None:
    grid = _check_matrix("x", x)
    _scale[grid](
        x, positions, table, factor,
        STRIDE=_stride(x), WIDTH=x.shape[1], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def finish_logits(logits: Tensor, *, divisor: float = 1.0, cap: float = 0.0) -> None:
    """`Kernels.finish_logits`, of logits in the model's dtype. logits: [R, V]."""
    check_divisor_and_cap(divisor, cap)
    grid = _check_matrix("logits", logits)
    _check_dense("logits", logits, logits.dtype, logits.shape)
    _finish_logits[grid](
        logits, divisor, cap, CAPPED=cap > 0, WIDTH=logits.shape[1], BLOCK=_BLOCK, num_warps=4
    )


def _check_matrix(name: str, x: Tensor) -> tuple[int, int]:
    """Two dimensions, dense rows. Returns the grid: a program for each block of each row."""
    if x.dim() != 2:
        raise KernelArgumentError(f"{name} has shape {tuple(x.shape)}; need two dimensions")
    _check_float(name, x)
    _check_rows(name, x, x.dtype, x.shape)
    return x.shape[0], triton.cdiv(x.shape[1], _BLOCK)


# --- rotation, and the write to the cache -----------------------------------------------------------

_HEADS = 8  # heads of one program


@triton.jit
def _part(base, heads_inside, count: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [0, count) of each head as float32 [heads, BLOCK]. base: [heads, 1] pointers."""
    i = tl.arange(0, BLOCK)[None, :]
    return tl.load(base + i, mask=heads_inside & (i < count), other=0.0).to(tl.float32)


@triton.jit
def _store_part(
    base, x, heads_inside, scale_ptr, head, count: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The inverse of `_part`; in an fp8 cache, values are divided by their head's scale and saturate."""
    i = tl.arange(0, BLOCK)[None, :]
    if scale_ptr is not None:
        x = tl.div_rn(x, tl.load(scale_ptr + head, mask=heads_inside, other=1.0))
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(base + i, x.to(base.dtype.element_ty), mask=heads_inside & (i < count))


@triton.jit
def _normed_part(
    x, scale, weight_base, heads_inside, dtype: tl.constexpr,
    count: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_normed`. scale: [heads, 1], one over the root mean square."""
    weight = _part(weight_base, heads_inside, count, BLOCK)
    rounded = (x * scale).to(weight_base.dtype.element_ty).to(tl.float32)
    return (rounded * weight).to(dtype).to(tl.float32)


@triton.jit
def _norm_and_rotate(
    in_base, out_base, heads_inside, head, norm_ptr, eps, angle_ptr, scale_ptr,
    D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, from in_base to out_base (both [heads, 1] pointers).

    The two rotated halves and the rest are three tiles, each contiguous in memory. Angles and norm
    weights are loaded for each head: as tiles of the same shape they get the same layout, so threads
    exchange nothing.
    """
    REST: tl.constexpr = D - 2 * HALF
    first = _part(in_base, heads_inside, HALF, HALF_BLOCK)
    second = _part(in_base + HALF, heads_inside, HALF, HALF_BLOCK)
    rest = _part(in_base + 2 * HALF, heads_inside, REST, REST_BLOCK)
    angle_base = angle_ptr + tl.zeros_like(head)
    cos = _part(angle_base, heads_inside, HALF, HALF_BLOCK)
    sin = _part(angle_base + HALF, heads_inside, HALF, HALF_BLOCK)
    if norm_ptr is not None:
        total = tl.sum(first * first + second * second, axis=1) + tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(total / D + eps)[:, None]
        base = norm_ptr + tl.zeros_like(head)
        dtype: tl.constexpr = in_base.dtype.element_ty
        first = _normed_part(first, scale, base, heads_inside, dtype, HALF, HALF_BLOCK)
        second = _normed_part(second, scale, base + HALF, heads_inside, dtype, HALF, HALF_BLOCK)
        rest = _normed_part(rest, scale, base + 2 * HALF, heads_inside, dtype, REST, REST_BLOCK)
    turned = first * cos - second * sin
    _store_part(out_base, turned, heads_inside, scale_ptr, head, HALF, HALF_BLOCK)
    turned = second * cos + first * sin
    _store_part(out_base + HALF, turned, heads_inside, scale_ptr, head, HALF, HALF_BLOCK)
    _store_part(out_base + 2 * HALF, rest, heads_inside, scale_ptr, head, REST, REST_BLOCK)


@triton.jit
def _rope_write_kv(
    qkv_ptr, positions_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr,
    q_norm_ptr, k_norm_ptr, eps, k_scale_ptr, v_scale_ptr,
    STRIDE: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    D_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, then groups of HEADS heads: first query heads, then key heads, then value heads."""
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row_ptr = qkv_ptr + token * STRIDE
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    h = tl.arange(0, HEADS)[:, None]
    if group < Q_GROUPS:
        head = group * HEADS + h
        heads = row_ptr + head * D
        _norm_and_rotate(
            heads, heads, head < Q_HEADS, head, q_norm_ptr, eps, angle_ptr, None,
            D, HALF, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        if slot >= 0:
            first = slot // BLOCK_SIZE * (KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE
            if group < Q_GROUPS + KV_GROUPS:
                head = (group - Q_GROUPS) * HEADS + h
                _norm_and_rotate(
                    row_ptr + (Q_HEADS + head) * D,
                    k_cache_ptr + (first + head * BLOCK_SIZE) * D,
                    head < KV_HEADS, head, k_norm_ptr, eps, angle_ptr, k_scale_ptr,
                    D, HALF, HALF_BLOCK, REST_BLOCK,
                )  # fmt: skip
            else:
                head = (group - Q_GROUPS - KV_GROUPS) * HEADS + h
                v = _part(row_ptr + (Q_HEADS + KV_HEADS + head) * D, head < KV_HEADS, D, D_BLOCK)
                out = v_cache_ptr + (first + head * BLOCK_SIZE) * D
                _store_part(out, v, head < KV_HEADS, v_scale_ptr, head, D, D_BLOCK)


def rope_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """`Kernels.rope_write_kv` for the GPU's cache.

    k_cache, v_cache: [num_blocks, kv_heads, block_size, D], of qkv's dtype, or float8_e4m3fn with
    k_scale, v_scale: [kv_heads] float32; it then stores the float32 result divided by the scale,
    rounded once and saturating at 448. positions, slot_mapping: [T] int32 or int64.
    """
    if k_cache.dim() != 4 or qkv.dim() != 2 or cos_sin.dim() != 2:
        raise KernelArgumentError(
            f"qkv {tuple(qkv.shape)}, k_cache {tuple(k_cache.shape)}, cos_sin "
            f"{tuple(cos_sin.shape)}; need [T, heads * D], [blocks, heads, block_size, D], [P, R]"
        )
    (tokens, width), (_, kv_heads, block_size, head_dim) = qkv.shape, k_cache.shape
    fp8, rotary_dim = k_cache.dtype is torch.float8_e4m3fn, cos_sin.shape[1]
    heads, rest = divmod(width, head_dim)
    q_heads = heads - 2 * kv_heads
    if rest or q_heads <= 0 or q_heads % kv_heads:
        raise KernelArgumentError(
            f"qkv is {width} wide: not whole groups of query heads beside {kv_heads} key and value "
            f"heads of {head_dim}"
        )
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise KernelArgumentError(f"cos_sin is {rotary_dim} wide; need an even R <= {head_dim}")
    if (k_scale is not None, v_scale is not None) != (fp8, fp8):
        raise KernelArgumentError(
            f"an fp8 cache, and no other, has scales; this is {k_cache.dtype}"
        )
    _check_float("qkv", qkv)
    _check_rows("qkv", qkv, qkv.dtype, qkv.shape)
    _check_ids("positions", positions, (tokens,))
    _check_ids("slot_mapping", slot_mapping, (tokens,))
    _check_dense("cos_sin", cos_sin, torch.float32, cos_sin.shape)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_dense(name, cache, k_cache.dtype if fp8 else qkv.dtype, k_cache.shape)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            _check_norm_weight(name, norm, qkv.dtype, head_dim)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _check_dense(name, scale, torch.float32, (kv_heads,))
    half = rotary_dim // 2
    head_block = triton.next_power_of_2(head_dim)
    groups = triton.cdiv(q_heads, _HEADS) + 2 * triton.cdiv(kv_heads, _HEADS)
    _rope_write_kv[(tokens, groups)](
        qkv, positions, cos_sin, k_cache, v_cache, slot_mapping,
        q_norm, k_norm, eps, k_scale, v_scale,
        STRIDE=_stride(qkv), Q_HEADS=q_heads, KV_HEADS=kv_heads, D=head_dim,
        HALF=half, BLOCK_SIZE=block_size, HEADS=_HEADS,
        D_BLOCK=head_block,
        HALF_BLOCK=triton.next_power_of_2(max(1, half)),
        REST_BLOCK=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        num_warps=_warps(_HEADS * head_block),
    )  # fmt: skip


# --- argument checks --------------------------------------------------------------------------------


def _warps(elements: int) -> int:
    """Sixteen elements per thread, two loads of 16 bytes in a 16-bit dtype; not yet measured."""
    return max(1, min(16, elements // 512))


def _stride(x: Tensor) -> int:
    """Elements from one token to the next. For a single token, PyTorch may give any stride, even 1."""
    return int(max(x.stride(0), x.shape[1:].numel()))


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise KernelArgumentError(f"{name} is {x.dtype}; need float32, bfloat16 or float16")


def _check_rows(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As `_check_dense`, but rows may have any stride with which they do not overlap."""
    dense = x.is_contiguous() or (x[0].is_contiguous() and x.stride(0) >= x[0].numel())
    _check(name, x, dtype, shape, dense)


def _check_dense(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of this dtype and shape, contiguous, and aligned."""
    _check(name, x, dtype, shape, x.is_contiguous())


def _check_ids(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    _check(
        name, x, torch.int64 if x.dtype is torch.int64 else torch.int32, shape, x.is_contiguous()
    )


def _check(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], dense: bool
) -> None:  # fmt: skip
    if x.dtype is not dtype or x.shape != shape or not dense or x.data_ptr() % ALIGNMENT:
        raise KernelArgumentError(
            f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} from address "
            f"{x.data_ptr():#x}; need {dtype} {tuple(shape)}, dense, from a multiple of {ALIGNMENT}"
        )


def _check_norm(x: Tensor, weight: Tensor) -> int:
    """Returns the stride between tokens."""
    _check_float("x", x)
    _check_rows("x", x, x.dtype, x.shape)
    _check_norm_weight("weight", weight, x.dtype, x.shape[-1])
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise KernelArgumentError(f"x is {x.shape[-1]} wide; need 1 to {MAX_WIDTH}")
    return _stride(x)


def _check_norm_weight(name: str, weight: Tensor, dtype: torch.dtype, width: int) -> None:
    """The weight is float32 or of the same dtype as x."""
    _check_dense(name, weight, torch.float32 if weight.dtype is torch.float32 else dtype, (width,))


def _out_like(shape: tuple[int, ...], x: Tensor, out: Tensor | None) -> Tensor:
    """`out` if it fits, a new tensor if there is none."""
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    _check_dense("out", out, x.dtype, shape)
    return out

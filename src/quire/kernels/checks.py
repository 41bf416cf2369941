"""Argument checks shared by every implementation: a wrong tensor must raise, and never read other memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire import dtypes
from quire.errors import EngineError
from quire.kernels.sampling import SAMPLE_ROW

FLOATS = tuple(getattr(torch, name) for name in dtypes.FLOATS)
MAX_HEAD_DIM = 512
BLOCK_UNIT = 16  # SUB in attention_tile.h: keys that must be contiguous


class KernelArgumentError(EngineError, ValueError):
    """A kernel was called with a tensor of the wrong dtype, shape or stride."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelArgumentError(message)


def _describe(name: str, tensor: Tensor, need: str) -> str:
    return (
        f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on "
        f"{tensor.device}; need {need}"
    )


def check_dense(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Contiguous, on the CPU, of this dtype and shape."""
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise KernelArgumentError(_describe(name, tensor, f"contiguous {dtype} {shape} on the CPU"))


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As `check_dense`, but the first dimension may have any stride that keeps rows apart."""
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not (tensor.is_contiguous() or _rows_are_dense(tensor))
        or not tensor.is_cpu
    ):
        need = f"{dtype} {shape} on the CPU with dense rows"
        raise KernelArgumentError(_describe(name, tensor, need))


def _rows_are_dense(tensor: Tensor) -> bool:
    sizes, strides, row = tensor.shape, tensor.stride(), 1
    for i in range(len(sizes) - 1, 0, -1):
        if sizes[i] != 1 and strides[i] != row:
            return False
        row *= sizes[i]
    return sizes[0] <= 1 or strides[0] >= row


def check_dims(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise KernelArgumentError(_describe(name, tensor, f"{dims} dimensions"))


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise KernelArgumentError(_describe(name, tensor, "float32, bfloat16 or float16"))


def pack_of(dtype: torch.dtype) -> int:
    """Elements of a CPU's cache that are kept side by side: see `kernels.cpu.layout`."""
    return 2 if dtype in (torch.bfloat16, torch.float8_e4m3fn) else 1


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    block_size: int


def check_scales(
    k_cache: Tensor, dtype: torch.dtype, kv_scales: tuple[Tensor, Tensor] | None
) -> None:
    """Of a cache of float8, which has them; any other is in `dtype`, that of queries."""
    stored = dtype if kv_scales is None else torch.float8_e4m3fn
    require(k_cache.dtype is stored, f"a cache in {k_cache.dtype} of {dtype}, scales {kv_scales}")
    for scales in kv_scales or ():
        check_dense("kv_scales", scales, torch.float32, (k_cache.shape[1],))


def check_caches(k_cache: Tensor, v_cache: Tensor) -> CacheGeometry:
    if k_cache.dtype is not torch.float8_e4m3fn:
        check_float("k_cache", k_cache)
    check_dims("k_cache", k_cache, 5)
    num_blocks, num_kv_heads, steps, block_size, pack = shape = k_cache.shape
    head_dim = steps * pack
    check_dense("k_cache", k_cache, k_cache.dtype, shape)
    require(
        pack == pack_of(k_cache.dtype),
        f"k_cache is {k_cache.dtype} {tuple(shape)}; its last dimension must be {pack_of(k_cache.dtype)}",
    )
    require(
        block_size % BLOCK_UNIT == 0 and 0 < block_size <= 128,
        f"block_size {block_size} must be a multiple of {BLOCK_UNIT} up to 128",
    )
    v_shape = (num_blocks, num_kv_heads, block_size // pack, head_dim, pack)
    check_dense("v_cache", v_cache, k_cache.dtype, v_shape)
    require(head_dim <= MAX_HEAD_DIM, f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    return CacheGeometry(num_blocks, num_kv_heads, head_dim, block_size)


def check_attention(
    q: Tensor,
    geometry: CacheGeometry,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> None:
    check_dims("q", q, 3)
    tokens, heads, _ = q.shape
    check_float("q", q)
    check_rows("q", q, q.dtype, (tokens, heads, geometry.head_dim))
    require(
        heads > 0 and heads % geometry.num_kv_heads == 0,
        f"q has {heads} heads, not a multiple of the cache's {geometry.num_kv_heads}",
    )
    requests = seq_lens.numel()
    check_dense("seq_lens", seq_lens, torch.int32, (requests,))
    check_dense("query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_dims("block_table", block_table, 2)
    check_dense("block_table", block_table, torch.int32, (requests, block_table.shape[1]))


def check_pairs(pairs: Sequence[tuple[int, int]]) -> None:
    destinations = {destination for _, destination in pairs}
    require(
        len(destinations) == len(pairs) and destinations.isdisjoint(source for source, _ in pairs),
        f"copy pairs {list(pairs)[:8]} name a destination twice, or also as a source",
    )


def check_norm(x: Tensor, weight: Tensor, out: Tensor | None = None) -> None:
    check_float("x", x)
    check_dims("x", x, 3 if x.dim() == 3 else 2)
    shape = x.shape
    check_rows("x", x, x.dtype, shape)
    check_norm_weight("weight", weight, x.dtype, shape[-1])
    require(shape[-1] > 0, "x has no columns")
    if out is not None:
        check_rows("out", out, x.dtype, shape)


def check_norm_weight(name: str, weight: Tensor, dtype: torch.dtype, width: int) -> None:
    """In float32 or in the dtype of the normed tensor: see `LayerKernels.rms_norm`."""
    check_dense(name, weight, torch.float32 if weight.dtype is torch.float32 else dtype, (width,))


def check_cos_sin(cos_sin: Tensor, head_dim: int) -> None:
    check_dims("cos_sin", cos_sin, 2)
    rotary_dim = cos_sin.shape[1]
    check_dense("cos_sin", cos_sin, torch.float32, cos_sin.shape)
    require(
        rotary_dim <= head_dim and rotary_dim % 2 == 0,
        f"cos_sin is {rotary_dim} wide; need an even width up to head_dim {head_dim}",
    )


def check_rope_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    geometry: CacheGeometry,
    slot_mapping: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
) -> int:
    """Returns the number of query heads."""
    check_dims("qkv", qkv, 2)
    tokens, width = qkv.shape
    check_float("qkv", qkv)
    check_rows("qkv", qkv, qkv.dtype, (tokens, width))
    heads, rest = divmod(width, geometry.head_dim)
    q_heads = heads - 2 * geometry.num_kv_heads
    require(
        rest == 0 and q_heads > 0 and q_heads % geometry.num_kv_heads == 0,
        f"qkv is {width} wide: not whole groups of query heads beside {geometry.num_kv_heads} key "
        f"and value heads of {geometry.head_dim}",
    )
    check_dense("positions", positions, torch.int64, (tokens,))
    check_dense("slot_mapping", slot_mapping, torch.int64, (tokens,))
    check_cos_sin(cos_sin, geometry.head_dim)
    for name, norm in zip(("q_norm", "k_norm"), norms, strict=True):
        if norm is not None:
            check_norm_weight(name, norm, qkv.dtype, geometry.head_dim)
    require(
        len({norm.dtype for norm in norms if norm is not None}) < 2,
        "q_norm and k_norm differ in dtype",
    )
    return q_heads


def fail_rope_write_kv(code: int) -> NoReturn:
    """Raise the error for a code of the check of contents: 1 or 2."""
    if code == 1:
        raise KernelArgumentError("a position is outside the rows of cos_sin")
    raise KernelArgumentError("a slot is past the cache's num_blocks * block_size")


def check_gated(gate_up: Tensor, activation: str, known: Iterable[str]) -> None:
    check_float("gate_up", gate_up)
    check_dims("gate_up", gate_up, 2)
    check_dense("gate_up", gate_up, gate_up.dtype, gate_up.shape)
    require(gate_up.shape[1] % 2 == 0, f"gate_up is {gate_up.shape[1]} wide; need an even width")
    check_activation(activation, known)


def check_activation(activation: str, known: Iterable[str]) -> None:
    if activation not in known:
        raise KernelArgumentError(f"activation={activation!r} is not one of {sorted(known)}")


def check_add(x: Tensor, residual: Tensor) -> None:
    check_float("x", x)
    check_dims("x", x, 2)
    check_dense("x", x, x.dtype, x.shape)
    check_dense("residual", residual, x.dtype, x.shape)


def check_scale(x: Tensor) -> None:
    check_float("x", x)
    check_dims("x", x, 2)
    check_rows("x", x, x.dtype, x.shape)


def check_scale_by_position(x: Tensor, positions: Tensor, table: Tensor) -> None:
    """All but the contents of positions."""
    check_scale(x)
    check_dense("positions", positions, torch.int64, (x.shape[0],))
    check_dims("table", table, 1)
    check_dense("table", table, torch.float32, table.shape)


def fail_scale_by_position() -> NoReturn:
    raise KernelArgumentError("a position is outside the table")


def check_finish_logits(logits: Tensor, dtype: torch.dtype, divisor: float, cap: float) -> None:
    check_dims("logits", logits, 2)
    check_dense("logits", logits, torch.float32, logits.shape)
    require(dtype in FLOATS, f"dtype is {dtype}; need float32, bfloat16 or float16")
    check_divisor_and_cap(divisor, cap)


def check_divisor_and_cap(divisor: float, cap: float) -> None:
    require(
        0 < divisor < math.inf and 0 <= cap < math.inf,
        f"divisor={divisor}, cap={cap}: need a finite divisor > 0 and a finite cap >= 0",
    )


_ATTENTION_FAILURES = {
    2: "query_start_loc must rise from 0 and end within q",
    3: "a request's seq_lens is below its query length or above its row of block_table",
    4: "block_table names a block outside the cache",
}


def fail_attention(code: int) -> NoReturn:
    """Raise the error for a code of the check of contents: 2, 3 or 4; any other means no memory."""
    if code in _ATTENTION_FAILURES:
        raise KernelArgumentError(_ATTENTION_FAILURES[code])
    raise MemoryError("paged_attention could not allocate its scratch memory")


def check_sample(logits: Tensor, rows: NDArray[np.void] | None) -> None:
    """All but the contents of rows."""
    check_dims("logits", logits, 2)
    count, vocab = logits.shape
    check_rows("logits", logits, torch.float32, (count, vocab))
    require(0 < vocab < 2**31, f"logits has {vocab} columns; need 1 to 2**31 - 1")
    if rows is None:
        return
    flags = rows.flags
    if (
        rows.dtype != SAMPLE_ROW
        or rows.shape != (count,)
        or not (flags.c_contiguous and flags.aligned)
    ):
        raise KernelArgumentError(
            f"rows is {rows.dtype} {rows.shape}; need contiguous SAMPLE_ROW ({count},)"
        )


_SAMPLE_FAILURES = {
    1: "a row's temperature is negative or not finite; 0 is greedy",
    2: "a row's top_p is outside [0, 1]; 1 is off",
    3: "a row's min_p is outside [0, 1]; 0 is off",
    4: "a row's top_k is negative; 0 is off",
}


def fail_sample(code: int) -> NoReturn:
    """Raise the error for a code of the check of rows: 1 to 4; any other means no memory."""
    if code in _SAMPLE_FAILURES:
        raise KernelArgumentError(_SAMPLE_FAILURES[code])
    raise MemoryError("sample could not allocate its scratch memory")

"""The C kernels behind the `Kernels` protocol, through ctypes.

Each method checks its tensors, so that C can trust pointers and strides; bounds that depend on
tensor contents (slots, positions, block ids) are checked in C, where it costs nothing, before
anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_char
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels import checks
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu import layout
from quire.kernels.cpu.codes import codes_product, stack
from quire.kernels.cpu.library import (
    ACTIVATIONS,
    DTYPES,
    AttentionArgs,
    QKVArgs,
    SampleArgs,
    load_library,
)
from quire.kernels.cpu.linear import dense_product
from quire.kernels.cpu.lora import HostAdapters
from quire.kernels.cpu.program import NativeProgram, can_run
from quire.kernels.cpu.tiles import choose_tiles
from quire.kernels.group import Group
from quire.kernels.ops import Activation
from quire.kernels.program import CachePart, Program
from quire.kernels.sampling import SampledTokens


def _scales(kv_scales: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """Fields of AttentionArgs and QKVArgs."""
    names = ("k_scales", "v_scales")
    return {name: each.data_ptr() for name, each in zip(names, kv_scales or (), strict=False)}


def _fail(message: str) -> NoReturn:
    raise KernelArgumentError(message)


class NativeKernels:
    """Raises `BuildError` from the constructor if the library cannot be compiled or loaded.

    `march` is the compiler's -march, other than "native" only to test the code of other CPUs.
    """

    name = "native"
    device = layout.device
    linear = staticmethod(dense_product)
    stack = staticmethod(stack)
    adapters = HostAdapters
    kv_cache_shapes = staticmethod(layout.kv_cache_shapes)

    def __init__(self, *, march: str = "native", activation_bits: int = 16) -> None:
        self._lib = load_library(march)
        self.codes = partial(codes_product, activation_bits=activation_bits)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        checks.check_norm(x, weight, out)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._norm(x, None, weight, out, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks.check_norm(x, weight)
        checks.check_dense("residual", residual, x.dtype, x.shape)
        out = torch.empty_like(residual)
        self._norm(x, residual, weight, out, eps)
        return out

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float
    ) -> None:
        self._lib.quire_rms_norm(
            x.data_ptr(),
            x.stride(0),
            x.shape[1] if x.dim() == 3 else 1,
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            out.numel() // weight.shape[0],
            weight.shape[0],
            eps,
            DTYPES[x.dtype],
            DTYPES[weight.dtype],
            torch.get_num_threads(),
        )

    def rope_write_kv(
        self,
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
        kv_scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        geometry = checks.check_caches(k_cache, v_cache)
        checks.check_scales(k_cache, qkv.dtype, kv_scales)
        q_heads = checks.check_rope_write_kv(
            qkv, positions, cos_sin, geometry, slot_mapping, (q_norm, k_norm)
        )
        norm = q_norm if k_norm is None else k_norm
        args = QKVArgs(
            qkv=qkv.data_ptr(),
            positions=positions.data_ptr(),
            slots=slot_mapping.data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            q_norm=None if q_norm is None else q_norm.data_ptr(),
            k_norm=None if k_norm is None else k_norm.data_ptr(),
            **_scales(kv_scales),
            norm_dtype=DTYPES[qkv.dtype if norm is None else norm.dtype],
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            qkv_stride=qkv.stride(0),
            tokens=qkv.shape[0],
            q_heads=q_heads,
            kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            half=cos_sin.shape[1] // 2,
            max_position=cos_sin.shape[0],
            block_size=geometry.block_size,
            num_blocks=geometry.num_blocks,
            eps=eps,
            dtype=DTYPES[qkv.dtype],
            threads=torch.get_num_threads(),
        )
        if code := self._lib.quire_rope_write_kv(byref(args)):
            checks.fail_rope_write_kv(code)

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[int, int]]
    ) -> None:
        checks.check_pairs(pairs)
        if not pairs:
            return
        table = torch.tensor(list(pairs), dtype=torch.int64)
        for layer in caches:
            geometry = checks.check_caches(*layer)
            for cache in layer:
                code = self._lib.quire_copy_blocks(
                    cache.data_ptr(),
                    table.data_ptr(),
                    len(pairs),
                    cache[0].numel() * cache.element_size(),
                    geometry.num_blocks,
                )
                if code:
                    _fail(f"a block to copy is outside [0, {geometry.num_blocks})")

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        max_query_len: int | None = None,
        min_query_len: int = 1,
        kv_scales: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        geometry = checks.check_caches(k_cache, v_cache)
        checks.check_scales(k_cache, q.dtype, kv_scales)
        checks.check_attention(q, geometry, block_table, query_start_loc, seq_lens)
        if out is None:
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        checks.check_dense("out", out, q.dtype, q.shape)
        args = AttentionArgs(
            q=q.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            block_table=block_table.data_ptr(),
            query_start_loc=query_start_loc.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            out=out.data_ptr(),
            q_stride=q.stride(0),
            table_stride=block_table.shape[1],
            requests=seq_lens.shape[0],
            tokens=q.shape[0],
            q_heads=q.shape[1],
            kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            block_size=geometry.block_size,
            num_blocks=geometry.num_blocks,
            window=window,
            **_scales(kv_scales),
            scale=scale,
            softcap=softcap,
            dtype=DTYPES[q.dtype],
            threads=torch.get_num_threads(),
            tiles=choose_tiles().tiles,
        )
        if code := self._lib.quire_paged_attention(byref(args)):
            checks.fail_attention(code)
        return out

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        checks.check_gated(gate_up, activation, ACTIVATIONS)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        self._lib.quire_gated(
            gate_up.data_ptr(),
            out.data_ptr(),
            width,
            rows,
            width,
            ACTIVATIONS[activation],
            DTYPES[gate_up.dtype],
            torch.get_num_threads(),
        )
        return out

    def compile(
        self, program: Program, caches: Sequence[CachePart], group: Group | None = None
    ) -> NativeProgram | None:
        return NativeProgram(program, caches, group) if can_run(program) else None

    def add(self, x: Tensor, residual: Tensor, *, scale: float = 1.0) -> None:
        checks.check_add(x, residual)
        dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
        self._lib.quire_add(x.data_ptr(), residual.data_ptr(), x.numel(), scale, dtype, threads)

    def scale(self, x: Tensor, factor: float) -> None:
        checks.check_scale(x)
        self._scale(x, None, None, factor)

    def scale_by_position(self, x: Tensor, positions: Tensor, table: Tensor) -> None:
        checks.check_scale_by_position(x, positions, table)
        self._scale(x, positions, table, 1.0)

    def _scale(
        self, x: Tensor, positions: Tensor | None, table: Tensor | None, factor: float
    ) -> None:
        code = self._lib.quire_scale(
            x.data_ptr(),
            x.stride(0),
            None if positions is None else positions.data_ptr(),
            None if table is None else table.data_ptr(),
            0 if table is None else len(table),
            factor,
            *x.shape,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        if code:
            checks.fail_scale_by_position()

    def finish_logits(
        self, logits: Tensor, dtype: torch.dtype, *, divisor: float = 1.0, cap: float = 0.0
    ) -> None:
        checks.check_finish_logits(logits, dtype, divisor, cap)
        self._lib.quire_finish_logits(
            logits.data_ptr(),
            logits.numel(),
            divisor,
            cap,
            DTYPES[dtype],
            torch.get_num_threads(),
        )

    def philox_uniform(self, seed: int, position: int, n: int) -> Tensor:
        out = torch.empty(n, dtype=torch.float32)
        self._lib.quire_philox_uniform(seed % 2**64, position % 2**64, out.data_ptr(), n)
        return out

    def sample(self, logits: Tensor, rows: NDArray[np.void] | None) -> SampledTokens:
        checks.check_sample(logits, rows)
        count, vocab = logits.shape
        results = (c_char * (9 * count))()  # an array's own .ctypes costs far more
        address = addressof(results)
        args = SampleArgs(
            logits=logits.data_ptr(),
            rows=None if rows is None else rows.ctypes.data,
            token_ids=address,
            valid=address + 8 * count,
            stride=logits.stride(0),
            num_rows=count,
            vocab=vocab,
            threads=torch.get_num_threads(),
        )
        if code := self._lib.quire_sample(byref(args)):
            checks.fail_sample(code)
        token_ids = np.frombuffer(results, np.int64, count)
        return SampledTokens(token_ids, np.frombuffer(results, np.bool_, count, 8 * count))

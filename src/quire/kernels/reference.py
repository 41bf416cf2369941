"""Every operation in plain PyTorch: the reference for the tests of fast kernels, and the fallback without a
C compiler.

It keeps the contract of `kernels/base.py` whatever PyTorch does for a shape: see docs/adr/0022.
Additions, products, quotients and square roots of elements are rounded correctly and may be computed for
all rows at once. A sum, or a function that PyTorch approximates, is computed for each row alone from a
new copy, so that the call is the same whatever other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels import checks
from quire.kernels.checks import require
from quire.kernels.cpu import layout
from quire.kernels.cpu.codes import reference_codes
from quire.kernels.cpu.linear import dense_product
from quire.kernels.cpu.lora import HostAdapters
from quire.kernels.dequantize import SideBySide
from quire.kernels.group import Group
from quire.kernels.ops import Activation
from quire.kernels.philox import gumbel_from_uniform, philox_words, uniform_from_words
from quire.kernels.program import CachePart, Program
from quire.kernels.sampling import SampledTokens


class ReferenceKernels:
    name = "reference"
    device = layout.device
    linear = staticmethod(dense_product)
    stack = SideBySide
    adapters = HostAdapters
    kv_cache_shapes = staticmethod(layout.kv_cache_shapes)

    def __init__(self, *, activation_bits: int = 16) -> None:
        self.codes = partial(reference_codes, activation_bits=activation_bits)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        checks.check_norm(x, weight, out)
        x32 = x.float()
        normed = x32 / torch.sqrt(_row_sums(x32 * x32) / x.shape[-1] + eps)
        result = (weight * normed.to(weight.dtype)).to(x.dtype)
        return result if out is None else out.copy_(result)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks.check_norm(x, weight)
        checks.check_dense("residual", residual, x.dtype, x.shape)
        residual += x
        return self.rms_norm(residual, weight, eps)

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
        if not bool(((positions >= 0) & (positions < cos_sin.shape[0])).all()):
            checks.fail_rope_write_kv(1)
        if bool((slot_mapping >= geometry.num_blocks * geometry.block_size).any()):
            checks.fail_rope_write_kv(2)
        heads = qkv.unflatten(1, (-1, geometry.head_dim))
        q, k, v = heads.split([q_heads, geometry.num_kv_heads, geometry.num_kv_heads], dim=1)
        k = k.clone() if k_norm is None else self.rms_norm(k, k_norm, eps)
        if q_norm is not None:
            self.rms_norm(q, q_norm, eps, out=q)
        _rotate(q, positions, cos_sin)
        _rotate(k, positions, cos_sin)
        if kv_scales is not None:
            k, v = (_to_float8(x, scales) for x, scales in zip((k, v), kv_scales, strict=True))
        written = slot_mapping >= 0
        slots, pack = slot_mapping[written], k_cache.shape[-1]
        blocks, offsets = slots // geometry.block_size, slots % geometry.block_size
        k_cache[blocks, :, :, offsets] = k[written].unflatten(-1, (-1, pack))
        v_cache[blocks, :, offsets // pack, :, offsets % pack] = v[written]

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[int, int]]
    ) -> None:
        checks.check_pairs(pairs)
        for layer in caches:
            geometry = checks.check_caches(*layer)
            require(
                all(0 <= block < geometry.num_blocks for pair in pairs for block in pair),
                f"a block to copy is outside [0, {geometry.num_blocks})",
            )
            for cache in layer:
                for source, destination in pairs:
                    cache[destination] = cache[source]

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
            out = torch.zeros(q.shape, dtype=q.dtype)
        checks.check_dense("out", out, q.dtype, q.shape)
        starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
        _check_extents(starts, lengths, q.shape[0], block_table.shape[1] * geometry.block_size)
        for b, length in enumerate(lengths):
            start, end = starts[b], starts[b + 1]
            if start == end:
                continue
            first_position = length - (end - start)
            first_key = max(0, first_position - window + 1) if window > 0 else 0
            first_block = first_key // geometry.block_size
            blocks = block_table[b, first_block : -(-length // geometry.block_size)].long()
            require(
                bool(((blocks >= 0) & (blocks < geometry.num_blocks)).all()),
                "block_table names a block outside the cache",
            )
            base = first_block * geometry.block_size
            # keys: [kv_heads, D, n], values: [kv_heads, n, D], both from position `base` on
            # caches: [blocks, kv_heads, D / p, size, p] and [blocks, kv_heads, size / p, D, p]
            keys = k_cache[blocks].permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2).float()
            values = v_cache[blocks].permute(1, 0, 2, 4, 3).flatten(1, 3).float()
            if kv_scales is not None:
                keys *= kv_scales[0][:, None, None]
                values *= kv_scales[1][:, None, None]
            for t in range(start, end):
                position = first_position + t - start
                low = max(base, position - window + 1 if window > 0 else 0) - base
                visible = slice(low, position + 1 - base)
                out[t] = _attend_one(
                    q[t], keys[:, :, visible], values[:, visible], scale=scale, softcap=softcap
                )
        return out

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        checks.check_gated(gate_up, activation, _ACTIVATIONS)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.empty(gate.shape, dtype=gate.dtype)
        for row, out in zip(gate, activated, strict=True):
            out.copy_(_ACTIVATIONS[activation](row.to(torch.float32, copy=True)))
        return activated * up

    def add(self, x: Tensor, residual: Tensor, *, scale: float = 1.0) -> None:
        checks.check_add(x, residual)
        residual += x if scale == 1.0 else x * scale

    def scale(self, x: Tensor, factor: float) -> None:
        checks.check_scale(x)
        x *= factor

    def scale_by_position(self, x: Tensor, positions: Tensor, table: Tensor) -> None:
        checks.check_scale_by_position(x, positions, table)
        if not bool(((positions >= 0) & (positions < len(table))).all()):
            checks.fail_scale_by_position()
        x.copy_(x.float() * table[positions, None])

    def finish_logits(
        self, logits: Tensor, dtype: torch.dtype, *, divisor: float = 1.0, cap: float = 0.0
    ) -> None:
        checks.check_finish_logits(logits, dtype, divisor, cap)
        logits.copy_((logits / divisor).to(dtype))
        if cap > 0:
            for row in logits:
                bent = torch.tanh(_fresh((row / cap).to(dtype))).to(dtype)
                row.copy_(bent * cap)

    def compile(
        self, program: Program, caches: Sequence[CachePart], group: Group | None = None
    ) -> None:
        return None

    def philox_uniform(self, seed: int, position: int, n: int) -> Tensor:
        return uniform_from_words(philox_words(seed, position, n))

    def sample(self, logits: Tensor, rows: NDArray[np.void] | None) -> SampledTokens:
        checks.check_sample(logits, rows)
        if rows is not None:
            _check_sample_rows(rows)
        best = logits.argmax(dim=-1)  # of NaN, where there is one
        token_ids, valid = best.numpy().copy(), np.ones(len(logits), dtype=np.bool_)
        for index, x in enumerate(logits):
            highest = float(x[best[index]])
            if math.isnan(highest):
                token_ids[index], valid[index] = 0, False
            elif rows is not None and rows[index]["temperature"] > 0 and highest > -math.inf:
                row = rows[index]
                u = self.philox_uniform(int(row["seed"]), int(row["position"]), len(x))
                scores = filtered_scores(x, row)
                token_ids[index] = int(torch.argmax(scores + gumbel_from_uniform(u)))
        return SampledTokens(token_ids, valid)


def _to_float8(x: Tensor, scales: Tensor) -> Tensor:
    """x: [T, heads, D]. At most 448, in units of each head's scale."""
    return (x.float() * (1.0 / scales[:, None])).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _gelu_tanh(x: Tensor) -> Tensor:
    """In float64, because 1 + tanh loses digits where tanh is near -1."""
    return torch.nn.functional.gelu(x.double(), approximate="tanh")


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": _gelu_tanh,
}


def filtered_scores(logits: Tensor, row: np.void) -> Tensor:
    """Scores of one row with a temperature, -inf where a filter leaves a token out. logits: [V], with
    no NaN and not all -inf. row: a `SAMPLE_ROW`. Returns [V] float32.
    """
    best, temperature = logits.max(), torch.tensor(float(row["temperature"]))
    below = ((logits - best) / temperature).clamp(max=-torch.finfo(torch.float32).tiny)
    scores = torch.where(logits == best, 0.0, below)
    min_p, top_k, top_p = float(row["min_p"]), int(row["top_k"]), float(row["top_p"])
    if min_p > 0:
        scores[scores < np.float32(math.log(min_p))] = -torch.inf
    if 0 < top_k < len(scores):
        last = scores.topk(top_k).values[-1]
        ties = (scores == last).nonzero()[:, 0]
        scores[ties[top_k - int((scores > last).sum()) :]] = -torch.inf
        scores[scores < last] = -torch.inf
    if top_p < 1:
        ordered, ids = scores.sort(descending=True, stable=True)
        weights = ordered.double().exp()
        before = weights.cumsum(0) - weights
        left_out = before >= top_p * weights.sum()
        left_out[0] = False
        scores[ids[left_out]] = -torch.inf
    return scores


def _check_sample_rows(rows: NDArray[np.void]) -> None:
    ranges = (("temperature", np.finfo(np.float32).max), ("top_p", 1), ("min_p", 1))
    for code, (name, most) in enumerate(ranges, start=1):
        if not ((rows[name] >= 0) & (rows[name] <= most)).all():
            checks.fail_sample(code)
    if (rows["top_k"] < 0).any():
        checks.fail_sample(4)


def _row_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension, kept as 1: halves are added until one element is left."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        folded = x[..., :half].clone()
        folded[..., : size - half] += x[..., half:]
        x = folded
    return x


def _rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """x: [T, heads, D], in place; each product is rounded to float32 before the sum."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].unsqueeze(1).split([half, half], dim=-1)  # [T, 1, half]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    x[..., : 2 * half] = rotated.to(x.dtype)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float) -> Tensor:
    """q: [q_heads, D]. keys: [kv_heads, D, n]. values: [kv_heads, n, D]. Returns [q_heads, D]."""
    grouped = q.view(keys.shape[0], -1, q.shape[-1])  # [kv_heads, group, D]
    scores = _by_head(grouped, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores, dim=-1)
    return _by_head(weights, values).reshape(q.shape).to(q.dtype)


def _by_head(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for each KV head alone. A rank has fewer heads, and on some processors (Zen 4) the bits of one
    `bmm` depend on their number."""
    return torch.stack([_fresh(x) @ _fresh(y) for x, y in zip(a, b, strict=True)])


def _fresh(x: Tensor) -> Tensor:
    """A dense float32 copy in new memory, so that the alignment is the same in every call."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _check_extents(starts: list[int], lengths: list[int], tokens: int, most: int) -> None:
    for b, length in enumerate(lengths):
        if not 0 <= starts[b] <= starts[b + 1] <= tokens:
            checks.fail_attention(2)
        query_len = starts[b + 1] - starts[b]
        if query_len and not query_len <= length <= most:
            checks.fail_attention(3)

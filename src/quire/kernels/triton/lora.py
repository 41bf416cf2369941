"""Adapters on a GPU: their matrices in slots at fixed addresses, so that CUDA graphs hold, and SGMV (Chen
et al. 2023, Punica) over tiles of rows.

`_shrink` computes t = s * A x in float32 for a tile of rows and a block of ranks, `_expand` adds B t to a
tile of the rounded product and rounds again. Each goes through the slots and multiplies for those that rows
of its tile use, all other rows being zero. So the launches depend on the number of rows alone, and a row's
bits on its own adapter alone: sums are chains over k, then over the ranks, in steps of one size.

Ranks are padded with zeros to the largest: `max_rank`, a multiple of 16, for each matrix of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import KernelArgumentError, require
from quire.kernels.lora import Deltas, PackedAdapter, leaves
from quire.kernels.ops import LinearProduct

ROWS = 16
"""Of a tile."""
_K = 64
_COLUMNS = 64


@triton.jit(do_not_specialize=["M"])
def _shrink(
    t_ptr, x_ptr, a_ptr, scale_ptr, slot_ptr, M,
    K: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x: [M, K], a: [SLOTS, RANKS, K], scale: [SLOTS, RANKS], slot: [M], t: [M, RANKS]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    slot = tl.load(slot_ptr + m, mask=m < M, other=-1)
    x_ptr += m.to(tl.int64)[:, None] * K + k[None, :]
    t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for s in range(SLOTS):
        mine = slot == s
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            at = a_ptr + (s * RANKS + r).to(tl.int64)[None, :] * K + k[:, None]
            for start in range(0, K, BLOCK_K):
                inside = k < K - start
                x = tl.load(x_ptr + start, mask=mine[:, None] & inside[None, :], other=0.0)
                a = tl.load(at + start, mask=inside[:, None], other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            scale = tl.load(scale_ptr + s * RANKS + r)
            t = tl.where(mine[:, None], acc * scale[None, :], t)
    out = t_ptr + m.to(tl.int64)[:, None] * RANKS + r[None, :]
    tl.store(out, t, mask=(slot >= 0)[:, None] & (m < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def _expand(
    y_ptr, t_ptr, b_ptr, gain_ptr, bias_ptr, slot_ptr, M,
    N: tl.constexpr, STRIDE: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y: [M, N] of rows of STRIDE, t: [M, RANK] of rows of RANKS, b: [SLOTS, N, RANK], gain: [SLOTS, N]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    slot = tl.load(slot_ptr + m, mask=m < M, other=-1)
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gain = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=tl.float32)
    inside = n < N
    for s in range(SLOTS):
        mine = slot == s
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            at = t_ptr + m.to(tl.int64)[:, None] * RANKS + r[None, :]
            t = tl.load(at, mask=mine[:, None], other=0.0)
            row = s * N + n
            at = b_ptr + row.to(tl.int64)[None, :] * RANK + r[:, None]
            b = tl.load(at, mask=inside[None, :], other=0.0)
            part = tl.dot(t, b.to(tl.float32), input_precision="ieee")
            delta = tl.where(mine[:, None], part, delta)
            g = tl.load(gain_ptr + row, mask=inside, other=1.0)
            gain = tl.where(mine[:, None], g[None, :], gain)
    at = y_ptr + m.to(tl.int64)[:, None] * STRIDE + n[None, :]
    mask = (slot >= 0)[:, None] & (m < M)[:, None] & inside[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    scaled = (y - bias[None, :] + delta) * gain + bias[None, :]
    y = tl.where(gain == 1.0, y + delta, scaled)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Site:
    """The slots of one product."""

    a: Tensor
    """[slots, parts * max_rank, K]"""
    scales: Tensor
    """[slots, parts * max_rank] float32"""
    parts: list[tuple[int, Tensor, Tensor]]
    """Of each matrix: its first output, B [slots, N, max_rank], gains [slots, N] float32."""


@dataclass(slots=True)
class _Packed:
    """On the host, as in the files."""

    deltas: Deltas
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        every = [each for matrices in self.deltas.values() for each in matrices]
        self.num_bytes = sum(each.a.nbytes + each.b.nbytes for each in every)


class DeviceAdapters:
    """`AdapterSet` on a GPU: of the products in layers, not of the head and the embedding."""

    def __init__(
        self,
        products: Sequence[LinearProduct],
        *,
        dtype: torch.dtype,
        capacity: int,
        max_rank: int,
        parts: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        rank = triton.next_power_of_2(max(max_rank, 16))
        self._rank, self._sites = rank, []
        for product, widths in zip(products[:-1], parts, strict=False):
            k = product.in_features
            ranks = rank * len(widths)
            made, first = [], 0
            for width in widths:
                b = torch.zeros(capacity, width, rank, dtype=dtype, device=device)
                made.append((first, b, torch.ones(capacity, width, device=device)))
                first += width
            a = torch.zeros(capacity, ranks, k, dtype=dtype, device=device)
            scales = torch.zeros(capacity, ranks, device=device)
            self._sites.append(_Site(a, scales, made))

    def pack(self, deltas: Deltas) -> _Packed:
        if any(site >= len(self._sites) for site in deltas):
            raise KernelArgumentError(
                "adapters of embeddings and heads are served on the CPU only; train without them"
            )
        return _Packed(deltas)

    def put(self, index: int, packed: PackedAdapter) -> None:
        """Copies wait for the steps that were launched before, as everything on the stream does."""
        assert isinstance(packed, _Packed)
        for number, site in enumerate(self._sites):
            site.scales[index] = 0.0
            given = {each.first: each for each in packed.deltas.get(number, ())}
            for part, (first, b, gains) in enumerate(site.parts):
                gains[index] = 1.0
                b[index] = 0.0
                each = given.pop(first, None)
                if each is None:
                    continue
                r, start = each.a.shape[0], part * self._rank
                site.a[index, start : start + r].copy_(each.a)
                site.scales[index, start : start + r] = each.scale
                b[index, :, :r].copy_(each.b)
                if each.gains is not None:
                    gains[index].copy_(each.gains)
            assert not given, "a matrix that is no part of its product"

    def clear(self, index: int) -> None:
        """Nothing to do: the slot is filled again before it is used."""

    def tensors(self) -> list[Tensor]:
        """All slots, whose addresses CUDA graphs contain."""
        parts = [each for site in self._sites for _, *part in site.parts for each in part]
        return [*parts, *(each for site in self._sites for each in (site.a, site.scales))]

    def rows(self, adapters: Tensor) -> DeviceRows:
        """adapters: on any device."""
        device = self._sites[0].a.device
        return DeviceRows(self, adapters.to(device))

    def add(self, site: int, product: LinearProduct, x: Tensor, y: Tensor, slots: Tensor) -> None:
        """y += what the adapters change. x: [M, K] dense; y: [M, N] dense; slots: [M] int32."""
        require(x.is_contiguous() and y.is_contiguous(), "x and y are dense")
        of, rows = self._sites[site], len(x)
        capacity, ranks, k = of.a.shape
        t = torch.empty(rows, ranks, dtype=torch.float32, device=x.device)
        tiles, block = triton.cdiv(rows, ROWS), min(self._rank, 64)
        _shrink[(tiles, ranks // block)](
            t, x, of.a, of.scales, slots, rows,
            K=k, RANKS=ranks, SLOTS=capacity, BLOCK_M=ROWS, BLOCK_R=block, BLOCK_K=_K,
        )  # fmt: skip
        bias = _bias(product)
        for number, (first, b, gains) in enumerate(of.parts):
            width = b.shape[1]
            _expand[(tiles, triton.cdiv(width, _COLUMNS))](
                y[:, first:], t[:, number * self._rank :], b, gains,
                None if bias is None else bias[first:], slots, rows,
                N=width, STRIDE=y.shape[1], RANKS=ranks, RANK=self._rank, SLOTS=capacity, BLOCK_M=ROWS,
                BLOCK_N=_COLUMNS,
            )  # fmt: skip


def _bias(product: LinearProduct) -> Tensor | None:
    """Of all its parts, side by side."""
    found = [getattr(leaf, "bias", None) for leaf in leaves(product)]
    if any(each is None for each in found):
        return None  # all have one, or none
    return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """`AdaptedRows` on a GPU."""

    adapters: DeviceAdapters
    slots: Tensor
    """[T] int32"""

    def linear(self, site: int, product: LinearProduct, x: Tensor) -> Tensor:
        y = product(x)
        if site >= 0:
            self.adapters.add(site, product, x, y, self.slots)
        return y

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        return x

    def keep(self, wanted: Tensor) -> DeviceRows:
        return DeviceRows(self.adapters, self.slots.index_select(0, wanted))

"""Products over matrices of codes on a GPU: see `quire.kernels.codes`.

`_multiply` dequantizes a tile of the matrix in registers, rounds it to the dtype of x, and multiplies. The
tile and the number of parts that k is split into depend on the dtype and on (N, K) alone, and parts are added
in order. So a row has the same bits in every batch. With many rows, unless these bits must stay the same, the
matrix is dequantized as a whole and multiplied by cuBLAS.

In memory: [N, K] bytes, or with 4 bits [N, K / 2]: of eight columns, byte i has column i in its low half and
column 4 + i in its high half. Scales are [groups, N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import require
from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales, empty_scales, round_to_int8
from quire.kernels.fields import PackedCodes, spread
from quire.kernels.triton.matmul import Tile

HALF = Tile(64, 64, 64, warps=4, stages=4)
FLOAT32 = Tile(32, 64, 64, warps=8, stages=2)
MANY_ROWS = 128
"""From more on, dequantizing the whole matrix costs less than doing it again for each tile of rows."""
PROGRAMS = 256
"""As many as a large GPU runs at once: k is split if there are fewer tiles of columns."""
_BLOCK = 1024


@triton.jit
def _numbers(
    codes, n, k, inside, scale_ptr, offset_ptr, super_ptr, super_min_ptr, values_ptr,
    N: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    ZERO: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """The float32 numbers that codes of columns k and rows n mean. n, k and codes broadcast to one shape."""
    if FLOAT8:  # as float16 a number is 2**-8 of its value; not every GPU has the conversion
        bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    elif values_ptr is not None:
        value = tl.load(values_ptr + codes.to(tl.int32)) - ZERO
    else:
        value = codes.to(tl.float32) - ZERO
    group = k // GROUP
    at = group * N + n
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SUPER:
        above = group // SUPER * N + n
        scale *= tl.load(super_ptr + above, mask=inside, other=0.0).to(tl.float32)
    if OFFSET == "zero":
        value -= tl.load(offset_ptr + at, mask=inside, other=0).to(tl.float32)
    value *= scale
    if OFFSET == "minimum":
        minimum = tl.load(offset_ptr + at, mask=inside, other=0).to(tl.float32)
        if SUPER:
            minimum *= -tl.load(super_min_ptr + above, mask=inside, other=0.0).to(tl.float32)
        value += minimum
    return value


@triton.jit(do_not_specialize=["M"])
def _multiply(
    out_ptr, x_ptr, codes_ptr, scale_ptr, offset_ptr, super_ptr, super_min_ptr, values_ptr, bias_ptr, M,
    N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, FLOAT8: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x: [M, K], codes: [N, WIDTH] bytes, out: [parts, M, N]. Grid: tiles, those of the same columns of out
    together, and parts of PART columns of x."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(0) // tiles * BLOCK_N
    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, K)
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    m, n, j = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BYTES)
    m_inside, n_inside = m < M - first_m, n < N
    x_ptr += first_m * K + m[:, None] * K
    codes_ptr += n[None, :].to(tl.int64) * WIDTH
    HALVES: tl.constexpr = 8 // BITS
    column = j if BITS == 8 else j // 4 * 8 + j % 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        byte = start * BITS // 8 + j
        stored = n_inside[None, :] & (byte < WIDTH)[:, None]
        both = tl.load(codes_ptr + byte[:, None], mask=stored, other=0)
        for half in tl.static_range(HALVES):
            k = start + column + 4 * half
            k_inside = k < end
            codes = both if BITS == 8 else (both >> 4 * half) & 15
            group_k = start if GROUP % BLOCK_K == 0 else k[:, None]
            inside = (
                n_inside[None, :] if GROUP % BLOCK_K == 0 else n_inside[None, :] & k_inside[:, None]
            )
            weight = _numbers(
                codes, n[None, :], group_k, inside,
                scale_ptr, offset_ptr, super_ptr, super_min_ptr, values_ptr,
                N, GROUP, SUPER, OFFSET, ZERO, FLOAT8,
            )  # fmt: skip
            x = tl.load(x_ptr + k[None, :], mask=m_inside[:, None] & k_inside[None, :], other=0.0)
            acc = tl.dot(x, weight.to(x.dtype), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    out_ptr += (tl.program_id(1).to(tl.int64) * M + first_m) * N + m[:, None].to(tl.int64) * N
    mask = m_inside[:, None] & n_inside[None, :]
    tl.store(out_ptr + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    out_ptr, parts_ptr, bias_ptr, M, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + (part * M.to(tl.int64) + row) * N + n, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(
    out_ptr, ids_ptr, order_ptr, codes_ptr, scale_ptr, offset_ptr, super_ptr, super_min_ptr, values_ptr,
    N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `ids` of the matrix, or all. Grid: rows, and blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    n = row if ids_ptr is None else tl.load(ids_ptr + row).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    byte = k if BITS == 8 else k // 8 * 4 + k % 4
    codes = tl.load(codes_ptr + n * WIDTH + byte, mask=inside, other=0)
    if BITS == 4:
        codes = tl.where(k // 4 % 2 == 0, codes & 15, codes >> 4)
    number = _numbers(
        codes, n, k, inside, scale_ptr, offset_ptr, super_ptr, super_min_ptr, values_ptr,
        N, GROUP, SUPER, OFFSET, ZERO, FLOAT8,
    )  # fmt: skip
    to = k if order_ptr is None else tl.load(order_ptr + k, mask=inside, other=0)
    tl.store(out_ptr + row * K + to, number.to(out_ptr.dtype.element_ty), mask=inside)


class TritonCodes:
    """`CodesProduct` on a GPU. invariant: the bits of a row are the same in every batch. Rounding to 8 bits
    (`activation_bits`) is followed by rounding to the dtype of x, since a product is of floats."""

    def __init__(
        self,
        form: CodeFormat,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        bias: bool,
        device: torch.device,
        invariant: bool,
    ) -> None:
        self.form, self.in_features, self.out_features = form, in_features, out_features
        self.dtype, self.invariant = dtype, invariant

        width = -(-in_features // 8) * form.bits
        self._codes = torch.zeros(out_features, width, dtype=torch.uint8, device=device)
        self._values = None
        if form.values:
            self._values = torch.tensor(form.values, dtype=torch.float32, device=device)
        self._scales = Scales(
            *(
                None if each is None else each.t().contiguous()
                for each in empty_scales(form, out_features, in_features, device=device)
            )
        )
        self._order: Tensor | None = None
        self.bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None

    def fill_codes(self, row: int, column: int, codes: Tensor) -> None:
        packed = codes if self.form.bits == 8 else _pack(codes)
        first = column * self.form.bits // 8
        self._codes[row : row + len(codes), first : first + packed.shape[1]].copy_(packed)

    def fill_packed(self, row: int, packed: PackedCodes, rows: Tensor) -> None:
        self.fill_codes(row, 0, spread(packed, rows))

    def fill_scales(self, row: int, scales: Scales) -> None:
        for kept, given in zip(self._scales, scales, strict=True):
            if kept is not None:
                assert given is not None and given.dtype is kept.dtype, (self.form, scales)
                kept[:, row : row + len(given)].copy_(given.t())

    def fill_bias(self, first: int, bias: Tensor) -> None:
        assert self.bias is not None, "made without bias"
        self.bias[first : first + len(bias)].copy_(bias)

    def reorder(self, order: Tensor) -> None:
        self._order = order.long().to(self._codes.device)
        for first in range(0, self.out_features, _BLOCK):
            rows = self._codes[first : first + _BLOCK]
            if self.form.bits == 8:
                rows.copy_(F.pad(rows[:, self._order], (0, -len(order) % 8)))
            else:
                both = rows.view(len(rows), -1, 1, 4)
                codes = torch.cat((both & 15, both >> 4), dim=2).flatten(1)
                rows.copy_(_pack(codes[:, self._order]))

    def __call__(self, x: Tensor) -> Tensor:
        require(
            x.dtype is self.dtype and x.shape[1:] == (self.in_features,),
            f"x is {x.dtype} {tuple(x.shape)}; need {self.dtype} [M, {self.in_features}]",
        )
        if self.form.activation_bits == 8 and not self.form.float8:
            x = round_to_int8(x).to(x.dtype)
        if x.shape[0] > MANY_ROWS and not self.invariant:
            return F.linear(x, self._dequantized(None, self.out_features), self.bias)
        if self._order is not None:
            x = x[:, self._order]
        return self._multiply(x.contiguous())

    def rows(self, ids: Tensor) -> Tensor:
        return self._dequantized(ids, ids.shape[0])

    def _multiply(self, x: Tensor) -> Tensor:
        rows, n, k = x.shape[0], self.out_features, self.in_features
        tile = FLOAT32 if self.dtype is torch.float32 else HALF
        part, parts = _split(n, k, tile)
        out = torch.empty(rows, n, dtype=self.dtype, device=x.device)
        if rows == 0:
            return out
        sums, bias = out, self.bias
        if parts > 1:
            sums, bias = torch.empty(parts, rows, n, dtype=torch.float32, device=x.device), None
        _multiply[(triton.cdiv(rows, tile.m) * triton.cdiv(n, tile.n), parts)](
            sums, x, self._codes, *self._scales, self._values, bias, rows,
            **self._constants(), PART=part, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if parts > 1:
            _add_parts[(rows, triton.cdiv(n, _BLOCK))](
                out, sums, self.bias, rows, N=n, PARTS=parts, BLOCK=_BLOCK
            )
        return out

    def _dequantized(self, ids: Tensor | None, rows: int) -> Tensor:
        k, device = self.in_features, self._codes.device
        out = torch.empty(rows, k, dtype=self.dtype, device=device)
        if rows:
            _dequantize[(rows, triton.cdiv(k, _BLOCK))](
                out, ids, self._order, self._codes, *self._scales, self._values,
                **self._constants(), BLOCK=_BLOCK,
            )  # fmt: skip
        return out

    def _constants(self) -> dict[str, int | str]:
        form = self.form
        return {
            "N": self.out_features,
            "K": self.in_features,
            "WIDTH": self._codes.shape[1],
            "BITS": form.bits,
            "GROUP": form.group or 1 << 30,
            "SUPER": form.super_groups,
            "OFFSET": form.offset,
            "ZERO": form.zero,
            "FLOAT8": form.float8,
        }


def _split(n: int, k: int, tile: Tile) -> tuple[int, int]:
    """Columns of a part, and the number of parts. A part has at least four tiles of k."""
    blocks = triton.cdiv(k, tile.k)
    wanted = min(triton.cdiv(PROGRAMS, triton.cdiv(n, tile.n)), max(1, blocks // 4))
    part = triton.cdiv(blocks, wanted)
    return part * tile.k, triton.cdiv(blocks, part)


def _pack(codes: Tensor) -> Tensor:
    """[rows, K] codes of 4 bits. Returns [rows, ceil(K / 8) * 4] bytes."""
    eights = F.pad(codes, (0, -codes.shape[1] % 8)).reshape(len(codes), -1, 2, 4)
    return (eights[:, :, 0] | eights[:, :, 1] << 4).flatten(1)

"""Products over matrices of codes on the CPU: see `quire.kernels.codes`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import addressof, byref, c_int64
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quire.kernels import checks
from quire.kernels.codes import PANEL, CodeFormat
from quire.kernels.cpu import library
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.linear import CProduct, ExactSumProduct, gather, multiply
from quire.kernels.cpu.tiles import choose_tiles
from quire.kernels.dequantize import (
    Scales,
    SideBySide,
    dequantize,
    empty_scales,
    round_to_int8,
)
from quire.kernels.fields import PackedCodes, spread
from quire.kernels.memory import large_zeros
from quire.kernels.ops import LinearProduct

MOST_PARTS = 8  # LINEAR_PARTS in kernels.h
_DEQUANTIZED_AT_ONCE = 1 << 22  # weights


class CodesProduct(ABC):
    """`x @ weight.T + bias`; zeros until filled. Row i of the result is the same bits for every number of
    rows and every thread count."""

    __slots__ = ("bias", "dtype", "form", "in_features", "out_features")

    def __init__(
        self,
        form: CodeFormat,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        bias: bool,
    ) -> None:
        checks.require(dtype in checks.FLOATS, f"dtype {dtype} is not one of {checks.FLOATS}")
        self.form = form
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = torch.zeros(out_features, dtype=dtype) if bias else None

    def fill_bias(self, first: int, bias: Tensor) -> None:
        assert self.bias is not None, "made without bias"
        checks.check_dense("bias", bias, self.dtype, (bias.numel(),))
        self.bias[first : first + bias.numel()] = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, in_features], M >= 0. Returns [M, out_features]."""
        checks.check_rows("x", x, self.dtype, (x.shape[0], self.in_features))
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        return self._multiply(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding looks them up. ids: [T] int64. [T, in_features]"""
        checks.check_dense("ids", ids, torch.int64, (ids.numel(),))
        return self._rows(ids)

    @abstractmethod
    def fill_codes(self, row: int, column: int, codes: Tensor) -> None: ...

    def fill_packed(self, row: int, packed: PackedCodes, rows: Tensor) -> None:
        self.fill_codes(row, 0, spread(packed, rows))

    @abstractmethod
    def fill_scales(self, row: int, scales: Scales) -> None: ...

    @abstractmethod
    def reorder(self, order: Tensor) -> None: ...

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _rows(self, ids: Tensor) -> Tensor: ...


class PanelCodes(CodesProduct):
    """Computed by codes.c, or float8.c, from panels of 64 rows."""

    __slots__ = ("_codes", "_info", "_order", "_lib", "_scales", "c_weight")

    def __init__(
        self,
        form: CodeFormat,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        bias: bool,
    ) -> None:
        """Raises `BuildError` with no compiler."""
        self._lib = library.load_library()
        super().__init__(
            form, in_features=in_features, out_features=out_features, dtype=dtype, bias=bias
        )
        panels, groups = -(-out_features // PANEL), form.num_groups(in_features)
        supers = form.num_supers(in_features)
        self._codes = large_zeros((panels, -(-in_features // 8), PANEL * form.bits), torch.uint8)
        like = empty_scales(form, 0, in_features)
        self._scales = Scales(
            *(
                None if one is None else large_zeros((panels, count, PANEL), one.dtype)
                for one, count in zip(like, (groups, groups, supers, supers), strict=True)
            )
        )
        self._info = library.CodeInfo(
            **{
                name: None if one is None else one.data_ptr()
                for name, one in zip(
                    ("scales", "offsets", "super_scales", "super_minima"), self._scales, strict=True
                )
            },
            group=form.group or -(-in_features // 8) * 8,
            bits=form.bits,
            scale_type=library.SCALE_TYPES[form.scale],
            super_groups=form.super_groups,
            offset_type=library.OFFSET_TYPES[form.offset],
            zero=form.zero,
            activation_bits=form.activation_bits,
            float8=form.float8,
        )
        if form.values:  # held without a sign
            lift = -min(form.values)
            self._info.values[:] = [value + lift for value in form.values]
            self._info.zero += lift
            self._info.has_values = 1
        self._order: Tensor | None = None
        self.c_weight = library.LinearWeight(
            panels=self._codes.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            n=out_features,
            k=in_features,
            dtype=library.DTYPES[dtype],
            tiles=choose_tiles().tiles,
            codes=addressof(self._info),
        )

    def fill_codes(self, row: int, column: int, codes: Tensor) -> None:
        rows, columns = codes.shape
        checks.require(codes.dtype is torch.uint8 and codes.is_cpu, "codes are bytes on the CPU")
        checks.require(
            0 <= row <= row + rows <= self.out_features
            and 0 <= column <= column + columns <= self.in_features
            and column % 8 == 0,
            f"{rows} x {columns} codes do not fit at {row}, {column}",
        )
        self._lib.quire_pack_codes(
            byref(self.c_weight),
            codes.data_ptr(),
            codes.stride(0),
            codes.stride(1),
            row,
            column,
            rows,
            columns,
        )

    def fill_packed(self, row: int, packed: PackedCodes, rows: Tensor) -> None:
        blocks, last = self.in_features // packed.values, self.in_features % packed.values
        checks.check_dense("rows", rows, torch.uint8, (len(rows), blocks * packed.bytes))
        ends = (f.offset + packed.values * f.bits // 8 for f in packed.fields)
        checks.require(
            last == 0 and 0 <= row <= self.out_features - len(rows) and max(ends) <= packed.bytes,
            f"{len(rows)} rows of {packed} do not fit at row {row}",
        )
        numbers = [number for field in packed.fields for number in field]
        failed = self._lib.quire_pack_fields(
            byref(self.c_weight),
            rows.data_ptr(),
            packed.bytes,
            packed.values,
            (c_int64 * len(numbers))(*numbers),
            len(packed.fields),
            packed.flip,
            row,
            len(rows),
        )
        if failed:
            raise MemoryError("no memory for the codes of a few rows")

    def fill_scales(self, row: int, scales: Scales) -> None:
        for kept, given in zip(self._scales, scales, strict=True):
            if kept is None:
                continue
            assert given is not None and given.dtype is kept.dtype, (self.form, scales)
            rows, groups = given.shape
            checks.require(
                row + rows <= self.out_features and groups == kept.shape[1],
                f"{rows} x {groups} scales do not fit at row {row}",
            )
            first, end = row // PANEL, -(-(row + rows) // PANEL)
            if row % PANEL or rows % PANEL:
                at = torch.arange(row, row + rows)
                kept[at // PANEL, :, at % PANEL] = given
            else:
                kept[first:end].copy_(given.view(-1, PANEL, groups).transpose(1, 2))

    def reorder(self, order: Tensor) -> None:
        order = order.to(torch.int32).contiguous()
        checks.check_dense("order", order, torch.int32, (self.in_features,))
        for first in range(0, self.out_features, PANEL):
            rows = min(PANEL, self.out_features - first)
            self.fill_codes(first, 0, self._unpacked(first, rows)[:, order.long()].contiguous())
        self._order = order
        self._info.order = order.data_ptr()

    def _unpacked(self, first: int, rows: int) -> Tensor:
        """Codes of rows of one panel: [rows, in_features]."""
        eighths = self._codes[first // PANEL].view(-1, PANEL * self.form.bits)
        if self.form.bits == 4:
            low_high = torch.stack((eighths & 15, eighths >> 4), dim=1)
        else:
            low_high = eighths.view(-1, 2, PANEL * 4)
        columns = low_high.reshape(-1, 2, PANEL, 4).permute(2, 0, 1, 3).reshape(PANEL, -1)
        return columns[:rows, : self.in_features]

    def _multiply(self, x: Tensor) -> Tensor:
        return multiply(self._lib, self.c_weight, self.out_features, x)

    def _rows(self, ids: Tensor) -> Tensor:
        return gather(self._lib, self, ids)


class ReferenceCodes(CodesProduct):
    """Dequantized some rows at a time, and multiplied with exact sums (docs/adr/0022)."""

    __slots__ = ("_codes", "_order", "_scales")

    def __init__(
        self,
        form: CodeFormat,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        bias: bool,
    ) -> None:
        super().__init__(
            form, in_features=in_features, out_features=out_features, dtype=dtype, bias=bias
        )
        self._codes = torch.zeros(out_features, in_features, dtype=torch.uint8)
        self._scales = empty_scales(form, out_features, in_features)
        self._order: Tensor | None = None

    def fill_codes(self, row: int, column: int, codes: Tensor) -> None:
        rows, columns = codes.shape
        self._codes[row : row + rows, column : column + columns] = codes

    def fill_scales(self, row: int, scales: Scales) -> None:
        for kept, given in zip(self._scales, scales, strict=True):
            if kept is not None:
                assert given is not None and given.dtype is kept.dtype, (self.form, scales)
                kept[row : row + given.shape[0]] = given

    def reorder(self, order: Tensor) -> None:
        self._order = order.long()
        self._codes = self._codes[:, self._order]

    def _multiply(self, x: Tensor) -> Tensor:
        return self.rounded(self.sums(x))

    def sums(self, x: Tensor) -> Tensor:
        """The result without bias, not rounded: [M, out_features] float32."""
        x32 = x.float()
        if self.form.activation_bits == 8 and not self.form.float8:
            x32 = round_to_int8(x32)
        out = torch.empty(x.shape[0], self.out_features, dtype=torch.float32)
        step = max(1, _DEQUANTIZED_AT_ONCE // self.in_features)
        for first in range(0, self.out_features, step):
            weight = self._dequantized(slice(first, first + step))
            product = ExactSumProduct(
                in_features=self.in_features,
                out_features=weight.shape[0],
                dtype=torch.float32,
                bias=False,
            )
            product.fill(0, weight)
            out[:, first : first + step] = product(x32)
        return out

    def rounded(self, sums: Tensor) -> Tensor:
        return (sums if self.bias is None else sums.add_(self.bias)).to(self.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        inside = bool(((ids >= 0) & (ids < self.out_features)).all())
        checks.require(inside, f"a row id is outside [0, {self.out_features})")
        return self._dequantized(ids).to(self.dtype)

    def _dequantized(self, rows: slice | Tensor) -> Tensor:
        scales = Scales(*(None if each is None else each[rows] for each in self._scales))
        return dequantize(self.form, self._codes[rows], scales, self._order)


class PanelStack:
    """Products that C can compute, as one."""

    def __init__(self, products: Sequence[CProduct]) -> None:
        assert len(products) <= MOST_PARTS, len(products)
        self.products = tuple(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)
        self.dtype = products[0].dtype
        for product, following in pairwise(products):
            product.c_weight.next = addressof(following.c_weight)
        self.c_weight = products[0].c_weight

    def __call__(self, x: Tensor) -> Tensor:
        checks.check_rows("x", x, self.dtype, (x.shape[0], self.in_features))
        return multiply(library.load_library(), self.c_weight, self.out_features, x)

    def rows(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("nothing looks up rows of a stack")


def codes_product(
    form: CodeFormat,
    *,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    bias: bool,
    activation_bits: int = 16,
) -> CodesProduct:
    """`PanelCodes`, or `ReferenceCodes` where there is no compiler. activation_bits: 8 also if the format
    says 16."""
    sizes = {"in_features": in_features, "out_features": out_features}
    form = form.with_activations(activation_bits)
    try:
        return PanelCodes(form, **sizes, dtype=dtype, bias=bias)
    except BuildError:
        return ReferenceCodes(form, **sizes, dtype=dtype, bias=bias)


def reference_codes(form: CodeFormat, *, activation_bits: int, **sizes: Any) -> ReferenceCodes:
    return ReferenceCodes(form.with_activations(activation_bits), **sizes)


def stack(products: Sequence[LinearProduct]) -> LinearProduct:
    c_products = [product for product in products if isinstance(product, CProduct)]
    return PanelStack(c_products) if len(c_products) == len(products) else SideBySide(products)

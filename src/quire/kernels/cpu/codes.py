"""Products over matrices of codes on the CPU: see `quire.kernels.codes`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from quire.kernels import checks
from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.linear import ExactSumProduct
from quire.kernels.dequantize import Scales, dequantize
from quire.kernels.ops import LinearProduct

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

    @abstractmethod
    def fill_scales(self, row: int, scales: Scales) -> None: ...

    @abstractmethod
    def reorder(self, order: Tensor) -> None: ...

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _rows(self, ids: Tensor) -> Tensor: ...


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
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        inside = bool(((ids >= 0) & (ids < self.out_features)).all())
        checks.require(inside, f"a row id is outside [0, {self.out_features})")
        return self._dequantized(ids).to(self.dtype)

    def _dequantized(self, rows: slice | Tensor) -> Tensor:
        scales = Scales(*(None if each is None else each[rows] for each in self._scales))
        return dequantize(self.form, self._codes[rows], scales, self._order)


class ReferenceStack:
    """The results of several products, side by side."""

    def __init__(self, products: Sequence[LinearProduct]) -> None:
        self.products = tuple(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("nothing looks up rows of a stack")


def empty_scales(form: CodeFormat, rows: int, in_features: int) -> Scales:
    """Zeros."""
    groups, supers = form.num_groups(in_features), form.num_supers(in_features)
    stored = getattr(torch, form.scale)
    offset = None
    if form.offset != "none":
        is_byte = form.offset == "zero" or form.super_groups
        offset = torch.zeros(rows, groups, dtype=torch.uint8 if is_byte else stored)
    has_minimum = form.super_groups and form.offset == "minimum"
    return Scales(
        scale=torch.zeros(rows, groups, dtype=stored),
        offset=offset,
        super_scale=torch.zeros(rows, supers, dtype=torch.float16) if supers else None,
        super_minimum=torch.zeros(rows, supers, dtype=torch.float16) if has_minimum else None,
    )


def round_to_int8(x: Tensor) -> Tensor:
    """Each row as multiples of its largest magnitude / 127. x: [M, K] float32."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round(), 0.0) * scale

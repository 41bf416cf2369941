"""Products over matrices of codes on a GPU: see `quire.kernels.codes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales, dequantize
from quire.kernels.fields import PackedCodes, spread
from quire.kernels.ops import LinearProduct


class DequantizedCodes:
    """A matrix of codes, dequantized in each call. product: of x, weight and bias, as `F.linear`."""

    def __init__(
        self,
        form: CodeFormat,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        bias: bool,
        device: torch.device,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.form, self.in_features, self.out_features = form, in_features, out_features
        self.dtype, self.product = dtype, product
        self._codes = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        self._scales: list[Tensor | None] = [None] * len(Scales._fields)
        self._order: Tensor | None = None
        self.bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None

    def fill_codes(self, row: int, column: int, codes: Tensor) -> None:
        rows, columns = codes.shape
        self._codes[row : row + rows, column : column + columns].copy_(codes)

    def fill_packed(self, row: int, packed: PackedCodes, rows: Tensor) -> None:
        self.fill_codes(row, 0, spread(packed, rows))

    def fill_scales(self, row: int, scales: Scales) -> None:
        for i, given in enumerate(scales):
            if given is None:
                continue
            kept = self._scales[i]
            if kept is None:
                shape = (self.out_features, given.shape[1])
                kept = torch.zeros(shape, dtype=given.dtype, device=self._codes.device)
                self._scales[i] = kept
            kept[row : row + len(given)].copy_(given)

    def fill_bias(self, first: int, bias: Tensor) -> None:
        assert self.bias is not None, "made without bias"
        self.bias[first : first + len(bias)].copy_(bias)

    def reorder(self, order: Tensor) -> None:
        self._order = order.long().to(self._codes.device)
        self._codes = self._codes[:, self._order]

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self._dequantized(slice(None)), self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self._dequantized(ids)

    def _dequantized(self, rows: slice | Tensor) -> Tensor:
        parts = [None if part is None else part[rows] for part in self._scales]
        scale = parts[0]
        assert scale is not None, "scales were not filled"
        return dequantize(self.form, self._codes[rows], Scales(scale, *parts[1:]), self._order).to(
            self.dtype
        )


class Stack:
    """Products over one input: their results side by side."""

    def __init__(self, products: Sequence[LinearProduct]) -> None:
        self.products = tuple(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("nothing looks up rows of a stack")

"""What codes mean, in plain PyTorch, and what products of all kinds share: see `quire.kernels.codes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.ops import LinearProduct


class Scales(NamedTuple):
    """Of some rows and all or some groups. Dtypes as `CodeFormat` says."""

    scale: Tensor
    """[rows, groups]"""
    offset: Tensor | None = None
    """[rows, groups]: zeros (uint8) or minima."""
    super_scale: Tensor | None = None
    """[rows, supers] float16"""
    super_minimum: Tensor | None = None
    """[rows, supers] float16"""


def dequantize(
    form: CodeFormat, codes: Tensor, scales: Scales, order: Tensor | None = None
) -> Tensor:
    """codes: [N, K] uint8. order: [K], if `form.reordered`: the input of each column. [N, K] float32"""
    width = codes.shape[1]
    scale, minimum = widened_scales(form, scales)
    group = form.group or width
    values = code_values(form, codes)
    if form.offset == "zero":
        assert scales.offset is not None
        values -= _spread(scales.offset.float(), group, width)
    weight = values * _spread(scale, group, width)
    if minimum is not None:
        weight += _spread(minimum, group, width)
    if order is not None:
        weight = torch.empty_like(weight).index_copy_(1, order.long(), weight)
    return weight


def empty_scales(
    form: CodeFormat, rows: int, in_features: int, *, device: torch.device | None = None
) -> Scales:
    """Zeros: the tensors that the format has."""
    groups, supers = form.num_groups(in_features), form.num_supers(in_features)
    stored: torch.dtype = getattr(torch, form.scale)
    has_minimum = form.offset == "minimum"
    offset = stored if has_minimum and not supers else torch.uint8

    def zeros(count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, count, dtype=dtype, device=device)

    return Scales(
        scale=zeros(groups, stored),
        offset=None if form.offset == "none" else zeros(groups, offset),
        super_scale=zeros(supers, torch.float16) if supers else None,
        super_minimum=zeros(supers, torch.float16) if supers and has_minimum else None,
    )


def round_to_int8(x: Tensor) -> Tensor:
    """Each row as multiples of its largest magnitude / 127, in float32. x: [M, K]"""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, (wide / scale).round(), 0.0) * scale


class SideBySide:
    """A stack of products that are computed one after the other."""

    def __init__(self, products: Sequence[LinearProduct]) -> None:
        self.products = tuple(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("nothing looks up rows of a stack")


def code_values(form: CodeFormat, codes: Tensor) -> Tensor:
    """The values of codes less the zero of all groups. uint8 -> float32."""
    if form.float8:
        return codes.view(torch.float8_e4m3fn).float()
    if form.values:
        values = torch.tensor(form.values, dtype=torch.float32, device=codes.device)
        return values[codes.long()] - form.zero
    return codes.float() - form.zero


def widened_scales(form: CodeFormat, scales: Scales) -> tuple[Tensor, Tensor | None]:
    """Scales and minima of each group, in float32: [rows, groups]."""
    scale = scales.scale.float()
    minimum = None
    if form.offset == "minimum":
        assert scales.offset is not None
        minimum = scales.offset.float()
    if form.super_groups:
        assert scales.super_scale is not None
        groups = scale.shape[1]
        scale = scale * _spread(scales.super_scale.float(), form.super_groups, groups)
        if minimum is not None:
            assert scales.super_minimum is not None
            minimum = minimum * _spread(scales.super_minimum.float(), form.super_groups, groups)
            minimum = -minimum
    return scale, minimum


def _spread(each: Tensor, count: int, width: int) -> Tensor:
    """Each column `count` times: [rows, width]."""
    return each.repeat_interleave(count, dim=1)[:, :width]

"""What codes mean, in plain PyTorch: see `quire.kernels.codes`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.codes import CodeFormat


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

"""Rounding a matrix of floats to codes: the inverse of `quire.kernels.dequantize`. It needs no data.

Codes are rounded to the nearest; what is searched for is the scale. If the largest weight of a group is at
the end of 16 codes, few codes are left for the many small weights. So several smaller ranges are tried, in
which large weights are clipped. A weight's error counts by its square plus the group's mean square. On the
built-in model the KL divergence of int4 falls by 20 to 40 %. That of int8 does not: int8 is not searched.
"""

from __future__ import annotations

from ctypes import addressof, byref, c_float

import torch
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.library import DTYPES, RoundJob, load_library
from quire.kernels.dequantize import Scales

AT_ONCE = 1 << 15
"""Weights. What is computed of them fits a core's cache, and PyTorch uses one thread for so few: several
threads load."""
LARGEST_FLOAT8 = 448.0
SYMMETRIC_ENDS = (-7.0, -7.5, -8.0, -8.5, -9.0, -9.5, -10.0, -11.0)
"""Where in [-8, 7] the weight of largest magnitude is put, whatever its sign: a scale may be negative."""
RANGES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a group's range that codes with a zero of their own span."""


def quantize(weight: Tensor, form: CodeFormat) -> tuple[Tensor, Scales]:
    """weight: [N, K] floats. The codes, [N, K] uint8, and scales in the dtypes that `form` stores. A weight
    that is not finite gives a scale that is not. form: ints, with zeros or symmetric, or float8; a group's
    scale is float.
    """
    assert not form.super_groups and not form.values and form.offset != "minimum", form
    if form.offset == "none" and weight.is_contiguous():
        try:
            return _quantize_in_c(weight, form)
        except BuildError:
            pass
    return quantize_in_torch(weight, form)


def _quantize_in_c(weight: Tensor, form: CodeFormat) -> tuple[Tensor, Scales]:
    """The same, symmetric, by rounding.c: several times as fast. Its sums have another order, so the scale of
    int4 may differ in its last bits."""
    library = load_library()
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.uint8)
    scale = torch.empty(rows, form.num_groups(width), dtype=getattr(torch, form.scale))
    places = (c_float * len(SYMMETRIC_ENDS))(*SYMMETRIC_ENDS)
    job = RoundJob(
        rows=weight.data_ptr(),
        codes=codes.data_ptr(),
        scales=scale.data_ptr(),
        places=addressof(places),
        count=rows,
        k=width,
        group=form.group or width,
        num_places=len(places),
        dtype=DTYPES[weight.dtype],
        scale_dtype=DTYPES[scale.dtype],
        rounding=2 if form.float8 else 1 if form.bits == 4 else 0,  # enum rounding
    )
    if library.quire_round_rows(byref(job)):
        raise MemoryError("no memory for a group of weights")
    return codes, Scales(scale)


def quantize_in_torch(weight: Tensor, form: CodeFormat) -> tuple[Tensor, Scales]:
    """The reference of `quantize`, and all there is for formats with zeros."""
    rows, width = weight.shape
    group = form.group or width
    codes = torch.empty(rows, width, dtype=torch.uint8)
    scale = torch.empty(rows, form.num_groups(width), dtype=getattr(torch, form.scale))
    zero = torch.empty(scale.shape, dtype=torch.uint8) if form.offset == "zero" else None
    padding = scale.shape[1] * group - width
    step = max(1, AT_ONCE // width)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        x = torch.nn.functional.pad(weight[part].float(), (0, padding)).view(-1, group)
        found, zeros = _scale(x, form)
        scale[part] = found.view(-1, scale.shape[1]).to(scale.dtype)
        wide = scale[part].float().view(-1, 1)
        scaled = x / torch.where(wide == 0, 1.0, wide)
        if form.float8:
            scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
            rounded = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            largest = (1 << form.bits) - 1
            rounded = scaled.round_().add_(form.zero if zeros is None else zeros)
            rounded = rounded.clamp_(1 if form.bits == 8 and zeros is None else 0, largest)
        codes[part] = rounded.view(-1, width + padding)[:, :width]
        if zero is not None and zeros is not None:
            zero[part] = zeros.view(-1, zero.shape[1])
    return codes, Scales(scale, zero)


def _scale(x: Tensor, form: CodeFormat) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros if the format has them, of groups. x: [groups, weights]. [groups, 1] each"""
    if form.offset == "zero":
        return _scale_and_zero(x, (1 << form.bits) - 1, getattr(torch, form.scale))
    largest = x.abs().amax(dim=1, keepdim=True)
    if form.float8:
        return largest / LARGEST_FLOAT8, None
    if form.bits == 8:
        return largest / 127, None
    end = torch.where(x.amax(dim=1, keepdim=True) == largest, largest, -largest)
    square = x.square()
    importance = square + square.mean(dim=1, keepdim=True)
    weighted = importance * x
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for place in SYMMETRIC_ENDS:
        divisor = torch.where(end == 0, 1.0, end)
        # A number divided by a tensor would be multiplied by its reciprocal, which rounds twice.
        q = (x * (torch.full_like(end, place) / divisor)).round_().clamp_(-8, 7)
        # With codes q the best scale is xq / qq, and it takes xq * xq / qq off the squared error.
        xq = (weighted * q).sum(dim=1, keepdim=True)
        qq = (q.square_().mul_(importance)).sum(dim=1, keepdim=True).clamp_min_(1e-38)
        gain = xq * xq / qq
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, xq / qq, scale)
    return torch.where(largest.isfinite(), scale, largest), None


def _scale_and_zero(x: Tensor, largest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low = x.amin(dim=1, keepdim=True).clamp_max_(0)
    high = x.amax(dim=1, keepdim=True).clamp_min_(0)
    square = x.square()
    importance = square + square.mean(dim=1, keepdim=True)
    scale = zero = torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    for share in RANGES if largest < 255 else RANGES[:1]:
        s = ((high - low) * (share / largest)).to(dtype).float()
        divisor = torch.where(s == 0, 1.0, s)
        z = (-low * share / divisor).round_().clamp_(0, largest)
        q = (x / divisor).round_().add_(z).clamp_(0, largest)
        error = q.sub_(z).mul_(s).sub_(x).square_().mul_(importance).sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return torch.where((high - low).isfinite(), scale, torch.nan), zero

"""Where GGUF's blocks have their codes and scales: see `quire.quantization.gguf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quire.kernels.dequantize import Scales
from quire.kernels.fields import BitField, PackedCodes
from quire.quantization.gguf_types import BLOCKS

_FIELDS: Mapping[str, tuple[BitField, ...]] = {
    "q4_0": (BitField(2, 16, 4),),
    "q4_1": (BitField(4, 16, 4),),
    "q5_0": (BitField(6, 16, 4), BitField(2, 1, 1, up=4)),
    "q5_1": (BitField(8, 16, 4), BitField(4, 1, 1, up=4)),
    "q8_0": (BitField(2, 32, 8),),
    "q2_K": (BitField(16, 32, 2),),
    "q3_K": (BitField(32, 32, 2), BitField(0, 32, 1, up=2)),
    "q4_K": (BitField(16, 32, 4),),
    "q5_K": (BitField(48, 32, 4), BitField(16, 32, 1, up=4)),
    "q6_K": (BitField(0, 64, 4), BitField(128, 32, 2, up=4)),
    "iq4_nl": (BitField(2, 16, 4),),
    "iq4_xs": (BitField(8, 16, 4),),
    "mxfp4": (BitField(1, 16, 4),),
}
PACKED: Mapping[str, PackedCodes] = {
    kind: PackedCodes(*BLOCKS[kind], fields, flip=128 if kind == "q8_0" else 0)
    for kind, fields in _FIELDS.items()
}


def read_scales(kind: str, rows: Tensor) -> Scales:
    """rows: [N, bytes of a row] uint8. In the dtypes of the type's `CodeFormat`."""
    scales = _SCALES[kind](rows.unflatten(1, (-1, BLOCKS[kind].bytes)))
    return Scales(*(None if each is None else each.flatten(1) for each in scales))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte: [N, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _half_first(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0))


def _halves_first(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0), _half(blocks, 2))


def _fields(packed: Tensor, bits: int, *, dim: int) -> Tensor:
    """Fields of so many bits, the lowest first, in a new dimension. uint8"""
    return torch.stack([packed >> shift for shift in range(0, 8, bits)], dim) & (1 << bits) - 1


def _q2_k(blocks: Tensor) -> Scales:
    packed = blocks[..., :16]
    scales = (packed & 15).view(torch.int8)
    return Scales(scales, packed >> 4, _half(blocks, 80), _half(blocks, 82))


def _q3_k(blocks: Tensor) -> Scales:
    low = _fields(blocks[..., 96:104], 4, dim=2).flatten(2)
    high = _fields(blocks[..., 104:108], 2, dim=2).flatten(2)
    return Scales((low | high << 4).view(torch.int8) - 32, None, _half(blocks, 108))


def _six_bits(blocks: Tensor) -> Scales:
    """Eight scales and minima of 6 bits in 12 bytes."""
    first, second, rest = blocks[..., 4:16].split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1).view(torch.int8)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return Scales(scales, minima, _half(blocks, 0), _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Scales:
    return Scales(blocks[..., 192:208].contiguous().view(torch.int8), None, _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Scales:
    low = _fields(blocks[..., 4:8], 4, dim=3).flatten(2)
    high = _fields(blocks[..., 2:4], 2, dim=3).flatten(2)
    return Scales((low | high << 4).view(torch.int8) - 32, None, _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Scales:
    """2^(byte - 128), half of E8M0's, since the values are twice E2M1's."""
    exponents = blocks[..., :1].int() - 128
    return Scales(torch.ldexp(torch.ones(exponents.shape), exponents).to(torch.bfloat16))


_SCALES: Mapping[str, Callable[[Tensor], Scales]] = {
    "q4_0": _half_first, "q4_1": _halves_first, "q5_0": _half_first, "q5_1": _halves_first,
    "q8_0": _half_first, "q2_K": _q2_k, "q3_K": _q3_k, "q4_K": _six_bits, "q5_K": _six_bits,
    "q6_K": _q6_k, "iq4_nl": _half_first, "iq4_xs": _iq4_xs, "mxfp4": _mxfp4,
}  # fmt: skip

"""From the bytes of GGUF's blocks to codes and scales: see `quire.quantization.gguf`.

Nibbles of a block of 32 are in two halves: byte i holds elements i (low) and i + 16 (high). Blocks of 256 are
cut into runs: byte i holds element i of each run that shares the bytes. Bytes are treated eight at a time, as
words of 64 bits, which is several times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.dequantize import Scales

_UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_EVERY_BYTE = 0x0101010101010101
_BIT_OF_EACH_BYTE = sum(1 << 9 * i for i in range(8)) - (1 << 64)  # as a signed number
_TO_HIGHEST_BIT = sum(128 - (1 << i) << 8 * i for i in range(8))


def unpack(kind: str, blocks: Tensor) -> tuple[Tensor, Scales]:
    """blocks: [N, blocks of a row, bytes of a block] uint8. Returns codes, [N, K] uint8, and their scales, in
    the dtypes of the type's `CodeFormat`."""
    codes, scales = _UNPACK[kind](blocks)
    codes = codes.flatten(1).view(torch.uint8)
    return codes, Scales(*(None if each is None else each.flatten(1) for each in scales))


def _words(blocks: Tensor, first: int, end: int) -> Tensor:
    """Some bytes of each block: [N, blocks, words] int64. They are copied by the largest unit that fits."""
    unit = next(unit for unit in _UNITS if not (blocks.shape[-1] | first | end) % unit.itemsize)
    part = blocks.view(unit)[..., first // unit.itemsize : end // unit.itemsize]
    return part.clone(memory_format=torch.contiguous_format).view(torch.int64)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte: [N, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _fields(words: Tensor, bits: int) -> Tensor:
    """[..., n] -> [..., 8 / bits, n]: fields of so many bits in each byte, the lowest first."""
    mask = ((1 << bits) - 1) * _EVERY_BYTE
    fields = [(words >> shift).bitwise_and_(mask) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-2)


def _nibbles(words: Tensor) -> Tensor:
    return _fields(words, 4)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return _nibbles(_words(blocks, 2, 18)), Scales(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> tuple[Tensor, Scales]:
    return _nibbles(_words(blocks, 4, 20)), Scales(_half(blocks, 0), _half(blocks, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bit j of 32 is element j: [N, blocks, 4] uint8 -> [N, blocks, 2, 2] words, whose bytes are 0 or 16."""
    words = packed.long().mul_(_EVERY_BYTE).bitwise_and_(_BIT_OF_EACH_BYTE).add_(_TO_HIGHEST_BIT)
    return (words >> 3).bitwise_and_(16 * _EVERY_BYTE).unflatten(2, (2, 2))


def _q5_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    codes = _nibbles(_words(blocks, 6, 22)) | _fifth_bits(blocks[..., 2:6])
    return codes, Scales(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> tuple[Tensor, Scales]:
    codes = _nibbles(_words(blocks, 8, 24)) | _fifth_bits(blocks[..., 4:8])
    return codes, Scales(_half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return blocks[..., 2:] ^ 128, Scales(_half(blocks, 0))  # int8 + 128


def _q2_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    codes = _fields(_words(blocks, 16, 80).unflatten(-1, (2, 4)), 2)
    packed = blocks[..., :16]
    scales = (packed & 15).view(torch.int8)
    return codes, Scales(scales, packed >> 4, _half(blocks, 80), _half(blocks, 82))


def _q3_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    low = _fields(_words(blocks, 32, 96).unflatten(-1, (2, 4)), 2).flatten(2, 3)
    high = _fields(_words(blocks, 0, 32), 1)
    packed = blocks[..., 96:108]
    nibbles = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    upper = packed[..., None, 8:] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    scales = (nibbles | upper.flatten(2) << 4).view(torch.int8) - 32
    return low | high << 2, Scales(scales, None, _half(blocks, 108))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and minima of 6 bits in 12 bytes: [N, blocks, 12] -> [N, blocks, 8], twice."""
    first, second, rest = packed.split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return scales.view(torch.int8), minima


def _q4_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    scales = Scales(*_six_bits(blocks[..., 4:16]), _half(blocks, 0), _half(blocks, 2))
    return _nibbles(_words(blocks, 16, 144).unflatten(-1, (4, 4))), scales


def _q5_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    scales = Scales(*_six_bits(blocks[..., 4:16]), _half(blocks, 0), _half(blocks, 2))
    low = _nibbles(_words(blocks, 48, 176).unflatten(-1, (4, 4))).flatten(2, 3)
    return low | _fields(_words(blocks, 16, 48), 1) << 4, scales


def _q6_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    low = _nibbles(_words(blocks, 0, 128).unflatten(-1, (2, 8))).flatten(3).unflatten(3, (4, 4))
    high = _fields(_words(blocks, 128, 192).unflatten(-1, (2, 4)), 2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return low | high << 4, Scales(scales, None, _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, Scales]:
    low = blocks[..., 4:8, None] >> torch.tensor((0, 4), dtype=torch.uint8) & 15
    high = blocks[..., 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3
    scales = (low.flatten(2) | high.flatten(2) << 4).view(torch.int8) - 32
    codes = _nibbles(_words(blocks, 8, 136).unflatten(-1, (8, 2)))
    return codes, Scales(scales, None, _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> tuple[Tensor, Scales]:
    """The scale is 2^(byte - 128), half of E8M0's, since the values are twice E2M1's."""
    exponents = blocks[..., :1].int() - 128
    scale = torch.ldexp(torch.ones(exponents.shape), exponents)
    return _nibbles(_words(blocks, 1, 17)), Scales(scale.to(torch.bfloat16))


_UNPACK = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_K": _q2_k,
    "q3_K": _q3_k, "q4_K": _q4_k, "q5_K": _q5_k, "q6_K": _q6_k, "iq4_nl": _q4_0,
    "iq4_xs": _iq4_xs, "mxfp4": _mxfp4,
}  # fmt: skip

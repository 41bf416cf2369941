"""From the bytes of GGUF's blocks to codes and scales: see `quire.quantization.gguf`.

Nibbles of a block of 32 are in two halves: byte i holds elements i (low) and i + 16 (high). Blocks of 256 are
cut into runs: byte i holds element i of each run that shares the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.dequantize import Scales


def unpack(kind: str, blocks: Tensor) -> tuple[Tensor, Scales]:
    """blocks: [N, blocks of a row, bytes of a block] uint8. Returns codes, [N, K] uint8, and their scales, in
    the dtypes of the type's `CodeFormat`."""
    codes, scales = _UNPACK[kind](blocks)
    return codes.flatten(1), Scales(*(None if each is None else each.flatten(1) for each in scales))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte: [N, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] -> [..., 2 n]: the low nibbles, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _shifts(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[N, blocks, n] -> [N, blocks, shifts, n]"""
    steps = torch.tensor(shifts, dtype=torch.uint8)[:, None]
    return (packed[..., None, :] >> steps) & mask


def _q4_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return _nibbles(blocks[..., 2:]), Scales(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> tuple[Tensor, Scales]:
    return _nibbles(blocks[..., 4:]), Scales(_half(blocks, 0), _half(blocks, 2))


def _fifth_bits(words: Tensor) -> Tensor:
    """Bit j of 32 is the fifth bit of element j: [N, blocks, 4] -> [N, blocks, 32], each 0 or 16."""
    return ((words[..., :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(2) << 4


def _q5_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return codes, Scales(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> tuple[Tensor, Scales]:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return codes, Scales(_half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return blocks[..., 2:] ^ 128, Scales(_half(blocks, 0))  # int8 + 128


def _q2_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    packed = blocks[..., :16]
    codes = [_shifts(half, (0, 2, 4, 6), 3).flatten(2) for half in blocks[..., 16:80].split(32, -1)]
    scales = (packed & 15).view(torch.int8)
    return torch.cat(codes, -1), Scales(scales, packed >> 4, _half(blocks, 80), _half(blocks, 82))


def _q3_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    high = _shifts(blocks[..., :32], tuple(range(8)), 1)  # a run of 32 for each bit
    low = torch.stack(blocks[..., 32:96].split(32, -1), dim=2)  # [N, blocks, 2, 32]
    low = (low[..., None, :] >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8)[:, None]) & 3
    codes = low.flatten(2, 3) | high << 2
    packed = blocks[..., 96:108]
    scales = _nibbles(packed[..., :8]) | _shifts(packed[..., 8:], (0, 2, 4, 6), 3).flatten(2) << 4
    scales = scales.view(torch.int8) - 32
    return codes, Scales(scales, None, _half(blocks, 108))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and minima of 6 bits in 12 bytes: [N, blocks, 12] -> [N, blocks, 8], twice."""
    first, second, rest = packed.split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return scales.view(torch.int8), minima


def _runs_of_nibbles(packed: Tensor) -> Tensor:
    """[N, blocks, 128] -> [N, blocks, 8, 32]: 32 bytes hold two runs."""
    pairs = packed.unflatten(-1, (4, 32))
    return torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(2, 3)


def _q4_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    scales = Scales(*_six_bits(blocks[..., 4:16]), _half(blocks, 0), _half(blocks, 2))
    return _runs_of_nibbles(blocks[..., 16:]), scales


def _q5_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    scales = Scales(*_six_bits(blocks[..., 4:16]), _half(blocks, 0), _half(blocks, 2))
    fifth = _shifts(blocks[..., 16:48], tuple(range(8)), 1)
    return _runs_of_nibbles(blocks[..., 48:]) | fifth << 4, scales


def _q6_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low = torch.cat((low & 15, low >> 4), dim=-1).unflatten(-1, (4, 32))
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    high = high >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8)[:, None] & 3
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return low | high << 4, Scales(scales, None, _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, Scales]:
    low = blocks[..., 4:8, None] >> torch.tensor((0, 4), dtype=torch.uint8) & 15
    high = blocks[..., 2:4, None] >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8) & 3
    scales = (low.flatten(2) | high.flatten(2) << 4).view(torch.int8) - 32
    codes = _nibbles(blocks[..., 8:].unflatten(-1, (8, 16)))
    return codes, Scales(scales, None, _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> tuple[Tensor, Scales]:
    """The scale is 2^(byte - 128), half of E8M0's, since the values are twice E2M1's."""
    exponents = blocks[..., :1].int() - 128
    scale = torch.ldexp(torch.ones(exponents.shape), exponents)
    return _nibbles(blocks[..., 1:]), Scales(scale.to(torch.bfloat16))


_UNPACK = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_K": _q2_k,
    "q3_K": _q3_k, "q4_K": _q4_k, "q5_K": _q5_k, "q6_K": _q6_k, "iq4_nl": _q4_0,
    "iq4_xs": _iq4_xs, "mxfp4": _mxfp4,
}  # fmt: skip

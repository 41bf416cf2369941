"""Codes as a file packs them: fields of bits in blocks of bytes.

A row is a sequence of blocks. A `BitField` is a range of bytes in each block, cut into runs: byte i of a run
holds, from its lowest bits on, bits of elements i, i + run, i + 2 run, ... A code is the or of its fields.
So a byte of two nibbles may hold neighbours (run 1) or elements that are 16 apart (GGUF's q4_0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_EVERY_BYTE = 0x0101010101010101


class BitField(NamedTuple):
    offset: int
    """Of its first byte in a block."""
    run: int
    """Bytes of a run."""
    bits: int
    """1, 2, 4 or 8, of each element."""
    up: int = 0
    """How far they are shifted to the left in the code."""


class PackedCodes(NamedTuple):
    """How the codes of a matrix are packed."""

    values: int
    """Codes of a block."""
    bytes: int
    """Of a block, with whatever else is in it."""
    fields: Sequence[BitField]
    flip: int = 0
    """Xored to each code: 128 makes int8 unsigned."""


def spread(packed: PackedCodes, rows: Tensor) -> Tensor:
    """rows: [N, bytes of a row] uint8, contiguous. Returns the codes: [N, K] uint8.

    Where runs allow it, bytes are treated eight at a time, as words of 64 bits.
    """
    blocks = rows.unflatten(1, (-1, packed.bytes))
    codes = torch.zeros(*blocks.shape[:2], packed.values, dtype=torch.uint8, device=rows.device)
    for field in packed.fields:
        num_bytes = packed.values * field.bits // 8
        part = blocks[..., field.offset : field.offset + num_bytes]
        part = part.clone(memory_format=torch.contiguous_format)
        unit = torch.int64 if field.run % 8 == 0 else torch.uint8
        mask = ((1 << field.bits) - 1) * (_EVERY_BYTE if unit is torch.int64 else 1)
        runs = part.view(unit).unflatten(-1, (-1, field.run // unit.itemsize))
        if field.bits < 8:
            shifted = [(runs >> shift) & mask for shift in range(0, 8, field.bits)]
            runs = torch.stack(shifted, dim=-2) << field.up
        codes |= runs.flatten(2).view(torch.uint8)
    return (codes ^ packed.flip if packed.flip else codes).flatten(1)

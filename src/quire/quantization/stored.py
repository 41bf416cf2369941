"""Matrices as safetensors checkpoints store them: which tensors, of which shapes, in which packing.

A format's file describes its matrices by `StoredMatrix`, and `quire.quantization.translate` reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

from quire.dtypes import FLOATS
from quire.kernels.codes import CodeFormat, ScaleType

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of the 16 floats of 4 bits, so that they are integers."""

Packing = Literal["rows", "columns", "awq", "int8", "float8"]
"""rows: each row a little-endian stream of bits; columns: each column. awq: 8 columns to a word, in AutoAWQ's
order. int8, float8: a byte each."""


class Entry(NamedTuple):
    """A tensor in a file's header."""

    dtype: str
    shape: tuple[int, ...]


Entries = Mapping[str, Entry]
"""The tensors of one matrix, by what follows its name and a dot."""


class Axis(NamedTuple):
    """One dimension: num / den indices for each output ("N") or input ("K"), rounded up; or num ("1")."""

    of: Literal["N", "K", "1"]
    num: int = 1
    den: int = 1
    exact: bool = False
    """Whether the format demands that nothing is rounded."""

    @property
    def unit(self) -> int:
        """The fewest outputs or inputs that end where an index does: those of a word, or of a group."""
        return self.den // gcd(self.num, self.den)

    def holding(self, wanted: range) -> range:
        """The indices that hold the wanted outputs. They begin at a unit, so up to `unit` - 1 others may be
        before these."""
        first = wanted.start // self.unit * self.unit
        return range(first * self.num // self.den, -(-wanted.stop * self.num // self.den))


ONE = Axis("1")
OUTPUTS, INPUTS = Axis("N"), Axis("K")


class StoredTensor(NamedTuple):
    suffix: str
    axes: tuple[Axis, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """How a matrix is stored in a safetensors file."""

    label: str
    form: CodeFormat
    packing: Packing
    bits: int
    """Of a code in the file."""
    codes: StoredTensor
    scale: StoredTensor
    """Its axes say what shares a scale. Bytes are exponents of 2, less 127 (E8M0)."""
    factor: float = 1.0
    """Of all scales."""
    zero: StoredTensor | None = None
    zero_added: int = 0
    """What is added to a stored zero, modulo 2^bits (of bytes, 256)."""
    all_scale: StoredTensor | None = None
    """A factor of all scales, float32."""
    all_divides: bool = False
    """Whether it divides them."""
    group_index: StoredTensor | None = None
    """The group of each input (GPTQ's g_idx)."""
    shape: StoredTensor | None = None
    """The shape as two numbers, to be compared."""
    unused: tuple[StoredTensor, ...] = ()


def scale_type(entries: Entries, suffix: str, *, default: ScaleType) -> ScaleType:
    """That of the file, so that nothing is rounded."""
    entry = entries.get(suffix)
    return entry.dtype if entry and entry.dtype in FLOATS else default  # type: ignore[return-value]


def scalars(entries: Entries, *suffixes: str) -> tuple[StoredTensor, ...]:
    """Tensors of the header as they are there, which are accepted and not used."""
    return tuple(
        StoredTensor(name, tuple(Axis("1", size) for size in entries[name].shape), (entries[name].dtype,))
        for name in suffixes
        if name in entries
    )  # fmt: skip


def scalar(entries: Entries, suffix: str) -> StoredTensor:
    """One number: [1], or without dimensions."""
    shape = entries[suffix].shape if suffix in entries else (1,)
    return StoredTensor(suffix, () if shape == () else (ONE,))

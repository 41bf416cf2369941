"""`LinearMethod` of safetensors checkpoints.

Whether a matrix is quantized is decided by its tensors in the files' headers, not by the config: that lists
layers by names, which differ from one tool to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.dtypes import FLOATS
from quire.errors import UnsupportedModelError
from quire.kernels.codes import CodeFormat
from quire.quantization.base import LinearShape, TensorWant
from quire.quantization.matrix import MatrixFormat, MatrixReader, QuantizedMethod
from quire.quantization.stored import Entries, Entry, StoredMatrix, StoredTensor

if TYPE_CHECKING:
    from quire.kernels.base import CodesProduct


class Scheme(Protocol):
    """A config, reduced. Frozen."""

    def quantizes(self, name: str) -> bool:
        """Of a matrix, by the config alone."""
        ...

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        """entries: empty where there are no weights."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointMethod(QuantizedMethod):
    """`LinearMethod` of a safetensors checkpoint."""

    scheme: Scheme
    entries: Mapping[str, Entries]
    """Of each matrix by its name; empty if there are no weights."""

    def entries_of(self, name: str) -> Entries:
        return self.entries.get(name, {})

    def format_of(self, name: str) -> MatrixFormat | None:
        entries = self.entries_of(name)
        weight = entries.get("weight")
        if weight is not None and weight.dtype in FLOATS:
            return None
        if not entries and not self.scheme.quantizes(name):
            return None
        return StoredFormat(self.scheme.matrix(name, entries))


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """`MatrixFormat` of a `StoredMatrix`."""

    stored: StoredMatrix

    @property
    def label(self) -> str:
        return self.stored.label

    def memory(self, shape: LinearShape) -> CodeFormat:
        return self.stored.form

    def wants(self, shape: LinearShape) -> Sequence[TensorWant]:
        stored = self.stored
        tensors = (
            stored.codes,
            stored.scale,
            stored.zero,
            stored.all_scale,
            stored.group_index,
            stored.shape,
        )
        return [_want(each, shape) for each in (*tensors, *stored.unused) if each is not None]

    def reader(self, shape: LinearShape, product: CodesProduct) -> MatrixReader:
        from quire.quantization.translate import Reader

        return Reader(self.stored, shape, product)


def _want(tensor: StoredTensor, shape: LinearShape) -> TensorWant:
    (part,) = shape.parts
    totals = {"N": part.out_features, "K": shape.in_features}
    sizes, taken = [], []
    for axis in tensor.axes:
        total = totals.get(axis.of, 1)
        if axis.exact and total * axis.num % axis.den:
            raise UnsupportedModelError(
                f"{part.name}.{tensor.suffix}: {total} {'outputs' if axis.of == 'N' else 'inputs'} are no "
                f"multiple of {axis.den // axis.num}, as the config demands; quantize the model with groups "
                "that divide them"
            )
        sizes.append(-(-total * axis.num // axis.den))
        taken.append(axis.holding(part.outputs) if axis.of == "N" else range(sizes[-1]))
    return TensorWant(tensor.suffix, tuple(sizes), tensor.dtypes, tuple(taken))


def read_entries(config: Mapping[str, object]) -> Mapping[str, Entries]:
    """From `tensors`, which a source adds to the config: {name: (dtype, shape)}."""
    tensors = config.get("tensors")
    found: dict[str, dict[str, Entry]] = {}
    for name, (dtype, shape) in (tensors if isinstance(tensors, dict) else {}).items():
        matrix, _, suffix = name.rpartition(".")
        found.setdefault(matrix, {})[suffix] = Entry(dtype, tuple(shape))
    return found


def is_listed(name: str, listed: Sequence[str]) -> bool:
    """Whether a list of a config names a matrix, by all of its name or the end of it."""
    short = name.removeprefix("model.")
    return any(item in (name, short) or item.endswith("." + short) for item in listed)

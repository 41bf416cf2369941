"""Quantized matrices of a checkpoint: what a format's file must define.

A `QuantizedMethod` says for each matrix by its name in which `MatrixFormat` it is stored, or that it is not
quantized. Formats may differ within a model and within a stack (q, k and v): each matrix becomes a product of
its own, and the kernels compute a stack of products in one pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from quire.kernels.codes import CodeFormat
from quire.quantization.base import (
    LinearMethod,
    LinearPart,
    LinearShape,
    LinearState,
    TensorWant,
    bias_wants,
)
from quire.quantization.stored import Entry
from quire.quantization.unquantized import UNQUANTIZED

if TYPE_CHECKING:
    import torch

    from quire.kernels.base import CodesProduct, LayerKernels, LinearProduct


class MatrixReader(Protocol):
    """Translates one matrix's tensors to codes and scales, and fills a product with them."""

    def load(self, suffix: str, first: int, rows: torch.Tensor) -> None:
        """As `LinearState.load`. Large tensors should be passed on at once, and not be kept."""

    def finish(self) -> None:
        """Called once, when every tensor has been loaded. Raises `CheckpointError`."""


class MatrixFormat(Protocol):
    """How one matrix is stored. Frozen, torch-free; equal to another one with the same values.

    A `shape` here has one part.
    """

    @property
    def label(self) -> str:
        """For the log: "int4 g128"."""

    def memory(self, shape: LinearShape) -> CodeFormat: ...

    def wants(self, shape: LinearShape) -> Sequence[TensorWant]:
        """Its tensors, without a bias."""

    def reader(self, shape: LinearShape, product: CodesProduct) -> MatrixReader: ...


class QuantizedMethod(ABC):
    """`LinearMethod` of a quantized checkpoint. Subclasses are frozen dataclasses."""

    __slots__ = ()

    @abstractmethod
    def format_of(self, name: str) -> MatrixFormat | None:
        """name: of a `LinearPart`, or of the embedding. None: not quantized."""

    def entries_of(self, name: str) -> Mapping[str, Entry]:
        """The tensors that the checkpoint has below a name, if that is known."""
        return {}

    def weight_bytes(self, shape: LinearShape, dtype_bytes: int) -> int:
        total = 0
        for single in split(shape):
            form = self.format_of(single.parts[0].name)
            if form is None:
                total += UNQUANTIZED.weight_bytes(single, dtype_bytes)
                continue
            bias = single.num_outputs * dtype_bytes if single.bias else 0
            total += form.memory(single).num_bytes(single.num_outputs, single.in_features) + bias
        return total

    def create(
        self, shape: LinearShape, *, dtype: torch.dtype, kernels: LayerKernels
    ) -> LinearState:
        formats = [self.format_of(part.name) for part in shape.parts]
        if not any(formats):
            return UNQUANTIZED.create(shape, dtype=dtype, kernels=kernels)
        states = [
            UNQUANTIZED.create(single, dtype=dtype, kernels=kernels)
            if form is None
            else _MatrixState(single, form, dtype, kernels)
            for single, form in zip(split(shape), formats, strict=True)
        ]
        return _StackState(shape, states, kernels)


def is_quantized(method: LinearMethod, name: str) -> bool:
    """Whether a matrix is stored as codes. name: as for `QuantizedMethod.format_of`."""
    return isinstance(method, QuantizedMethod) and method.format_of(name) is not None


def split(shape: LinearShape) -> list[LinearShape]:
    """A shape of its own for each part."""
    return [replace(shape, parts=(part,)) for part in shape.parts]


class _MatrixState:
    def __init__(
        self, shape: LinearShape, form: MatrixFormat, dtype: torch.dtype, kernels: LayerKernels
    ) -> None:
        self._shape = shape
        self._form = form
        self._product = kernels.codes(
            form.memory(shape),
            in_features=shape.in_features,
            out_features=shape.num_outputs,
            dtype=dtype,
            bias=shape.bias,
        )
        self._reader = form.reader(shape, self._product)

    def wants(self, part: LinearPart) -> Sequence[TensorWant]:
        return [*self._form.wants(self._shape), *bias_wants(self._shape, part)]

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        if suffix == "bias":
            self._product.fill_bias(first, rows.to(self._product.dtype).contiguous())
        else:
            self._reader.load(suffix, first, rows)

    def finish(self) -> LinearProduct:
        self._reader.finish()
        return self._product


class _StackState:
    def __init__(
        self, shape: LinearShape, states: Sequence[LinearState], kernels: LayerKernels
    ) -> None:
        self._shape = shape
        self._states = states
        self._kernels = kernels

    def wants(self, part: LinearPart) -> Sequence[TensorWant]:
        return self._states[self._shape.parts.index(part)].wants(part)

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        self._states[index].load(0, suffix, first, rows)

    def finish(self) -> LinearProduct:
        products = [state.finish() for state in self._states]
        return products[0] if len(products) == 1 else self._kernels.stack(products)

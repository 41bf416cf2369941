"""The family of weight formats: how a checkpoint stores the matrices of linear layers, and how they are
multiplied.

A `LinearMethod` is a config's format as plain data. It computes its bytes without torch, because memory
is planned before anything is loaded; only `create` may import torch. A `LinearState` takes one layer's
tensors from the checkpoint and becomes its product.

q, k and v (and gate and up) read the same input, so their matrices are stacked and multiplied as one:
fewer and wider products per layer. Each is a `LinearPart`, with its own tensors in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.dtypes import FLOATS

if TYPE_CHECKING:
    import torch

    from quire.kernels.base import LayerKernels, LinearProduct


@dataclass(frozen=True, slots=True)
class LinearPart:
    """Rows of one matrix of the checkpoint, [out_features, in_features]."""

    name: str
    """Its path without the trailing `.weight`. Several parts of a stack may be of one matrix."""
    out_features: int
    """In the checkpoint."""
    taken: range | None = None
    """The outputs that the layer computes; None for all."""

    @property
    def outputs(self) -> range:
        return range(self.out_features) if self.taken is None else self.taken


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A stack of matrices over one input."""

    in_features: int
    parts: tuple[LinearPart, ...]
    bias: bool

    @property
    def num_outputs(self) -> int:
        """The outputs of all parts: the width of the product."""
        return sum(len(part.outputs) for part in self.parts)

    @property
    def num_parameters(self) -> int:
        return self.num_outputs * (self.in_features + (1 if self.bias else 0))


@dataclass(frozen=True, slots=True)
class TensorWant:
    """A tensor that the checkpoint should hold."""

    suffix: str
    """The tensor's name is the part's name, a dot, and this."""
    shape: tuple[int, ...]
    """In the checkpoint, also if only a part is loaded."""
    dtypes: tuple[str, ...] = FLOATS
    """The dtypes that it may have there, by the names of `quire.dtypes`."""
    taken: tuple[range, ...] | None = None
    """The indices of each dimension that are loaded; None for all."""


def bias_wants(shape: LinearShape, part: LinearPart) -> tuple[TensorWant, ...]:
    """The bias, for most formats."""
    return (TensorWant("bias", (part.out_features,), taken=(part.outputs,)),) if shape.bias else ()


class LinearState(Protocol):
    """The weights of one layer while they are loaded, then its product."""

    def wants(self, part: LinearPart) -> Sequence[TensorWant]: ...

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        """Load rows of one tensor of part `index`, as in `WeightTarget.load`: in the dtype of the file,
        possibly from several threads."""

    def finish(self) -> LinearProduct:
        """The product. Called once, when every tensor has been loaded."""


class LinearMethod(Protocol):
    """A weight format. Frozen; equal to another one with the same values.

    A checkpoint may have some matrices in other formats, or unquantized. The method decides which ones,
    by the names of the parts.
    """

    def weight_bytes(self, shape: LinearShape, dtype_bytes: int) -> int:
        """The layer's bytes in memory. dtype_bytes: of an element of the model's dtype."""

    def create(
        self, shape: LinearShape, *, dtype: torch.dtype, kernels: LayerKernels
    ) -> LinearState:
        """dtype: the model's, of the product's input and result."""

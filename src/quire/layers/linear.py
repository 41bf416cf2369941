"""Linear layers made of several checkpoint matrices multiplied as one, behind a seam for other
weight formats.

q, k and v (and gate and up) read the same input, so their matrices are stacked and one product
serves all: fewer calls per layer and a wider, better fed GEMM. A `LinearMethod` decides how the
stacked matrix is stored and multiplied; quantized formats are other methods, with other tensors per
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from quire.kernels.base import LayerKernels, LinearProduct
from quire.layers.parameter import WeightTarget


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One matrix of the checkpoint: `name` is its path without the trailing `.weight`."""

    name: str
    out_features: int


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A stack of matrices over one input."""

    in_features: int
    parts: tuple[LinearPart, ...]
    bias: bool
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


class LinearState(Protocol):
    """The weights of one layer while they arrive, then the product over them."""

    def tensors(self, part: LinearPart) -> Mapping[str, tuple[int, ...]]:
        """Suffix -> shape of the tensors the checkpoint holds for this part."""

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        """Take the rows from `first` on of one tensor of part `index`; copies them. See
        `WeightTarget.load`.
        """

    def apply(self) -> LinearProduct:
        """The product, once every tensor has been loaded."""


class LinearMethod(Protocol):
    """A weight format. Stateless: `create` makes the state of one layer."""

    def create(self, shape: LinearShape) -> LinearState: ...


class UnquantizedLinearMethod:
    """Plain matrices in the model's dtype, as the kernels hold them."""

    def __init__(self, kernels: LayerKernels) -> None:
        self._kernels = kernels

    def create(self, shape: LinearShape) -> LinearState:
        return _UnquantizedState(shape, self._kernels)


class _UnquantizedState:
    """Each part goes from the file straight to its place in the matrix: no second copy, not even of one
    layer.
    """

    def __init__(self, shape: LinearShape, kernels: LayerKernels) -> None:
        self._shape = shape
        self._matrix = kernels.linear(
            in_features=shape.in_features,
            out_features=shape.out_features,
            dtype=shape.dtype,
            bias=shape.bias,
        )
        self._waiting = {
            (i, suffix) for i, part in enumerate(shape.parts) for suffix in self.tensors(part)
        }

    def tensors(self, part: LinearPart) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (part.out_features, self._shape.in_features)
        }
        if self._shape.bias:
            shapes["bias"] = (part.out_features,)
        return shapes

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        first += sum(part.out_features for part in self._shape.parts[:index])
        fill = self._matrix.fill if suffix == "weight" else self._matrix.fill_bias
        fill(first, rows.to(self._shape.dtype).contiguous())
        self._waiting.discard((index, suffix))

    def apply(self) -> LinearProduct:
        assert not self._waiting, f"not loaded: {sorted(self._waiting)} of {self._shape.parts}"
        return self._matrix


class Linear:
    """One product over one or several matrices of the checkpoint.

    Calling the layer works, but `bind()` gives the bare product: a decode step of a small model is all Python
    calls, and a layer in the loop would double them.
    """

    def __init__(
        self,
        parts: Sequence[LinearPart],
        *,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        method: LinearMethod,
    ) -> None:
        self.shape = LinearShape(
            in_features=in_features, parts=tuple(parts), bias=bias, dtype=dtype
        )
        self._state = method.create(self.shape)

    def targets(self) -> list[WeightTarget]:
        """The tensors this layer needs, in the order its parts are stacked."""
        return [
            WeightTarget(
                name=f"{part.name}.{suffix}",
                shape=shape,
                load=partial(self._state.load, index, suffix),
                kind="bias" if suffix == "bias" else "weight",
            )
            for index, part in enumerate(self.shape.parts)
            for suffix, shape in self._state.tensors(part).items()
        ]

    def bind(self) -> LinearProduct:
        return self._state.apply()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._state.apply()(x)

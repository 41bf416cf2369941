"""Matrices of floats: the format of a checkpoint that is not quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.quantization.base import LinearPart, LinearShape, LinearState, TensorWant, bias_wants

if TYPE_CHECKING:
    import torch

    from quire.kernels.base import LayerKernels, LinearProduct


@dataclass(frozen=True, slots=True)
class Unquantized:
    """Weights are converted to the model's dtype if the checkpoint has another."""

    def weight_bytes(self, shape: LinearShape, dtype_bytes: int) -> int:
        return shape.num_parameters * dtype_bytes

    def create(
        self, shape: LinearShape, *, dtype: torch.dtype, kernels: LayerKernels
    ) -> LinearState:
        return _State(shape, dtype, kernels)


UNQUANTIZED = Unquantized()


class _State:
    """Each part is loaded directly to its place in the matrix, without a second copy."""

    def __init__(self, shape: LinearShape, dtype: torch.dtype, kernels: LayerKernels) -> None:
        self._shape = shape
        self._dtype = dtype
        self._product = kernels.linear(
            in_features=shape.in_features,
            out_features=shape.num_outputs,
            dtype=dtype,
            bias=shape.bias,
        )
        self._waiting = {
            (i, want.suffix) for i, part in enumerate(shape.parts) for want in self.wants(part)
        }

    def wants(self, part: LinearPart) -> Sequence[TensorWant]:
        shape = self._shape
        weight = TensorWant("weight", (part.out_features, shape.in_features), taken=(part.outputs,))
        return [weight, *bias_wants(shape, part)]

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        first += sum(len(part.outputs) for part in self._shape.parts[:index])
        fill = self._product.fill if suffix == "weight" else self._product.fill_bias
        fill(first, rows.to(self._dtype).contiguous())
        self._waiting.discard((index, suffix))

    def finish(self) -> LinearProduct:
        assert not self._waiting, f"not loaded: {sorted(self._waiting)} of {self._shape.parts}"
        return self._product

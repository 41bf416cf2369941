"""The gated MLP (Shazeer 2020) as a part of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quire.kernels.base import LayerKernels
from quire.kernels.ops import Buf, Ops
from quire.layers.linear import Linear
from quire.layers.parameter import WeightTarget
from quire.layers.share import WHOLE, Share
from quire.layers.spec import MlpSpec
from quire.quantization.base import LinearMethod


class Mlp:
    """The MLP of one layer. Usable once every target has been loaded and `bind()` called."""

    def __init__(
        self,
        spec: MlpSpec,
        prefix: str,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        kernels: LayerKernels,
        method: LinearMethod,
        share: Share = WHOLE,
    ) -> None:
        self._activation = spec.activation
        self._inner, self._hidden = (
            (share.columns(size).start, size) for size in (spec.intermediate_size, hidden_size)
        )
        """First own column, and width of the whole."""
        self._gate_up, self._down = (
            Linear(shape, dtype=dtype, method=method, kernels=kernels)
            for shape in spec.linears(prefix, hidden_size, share)
        )

    def targets(self) -> Iterator[WeightTarget]:
        yield from self._gate_up.targets()
        yield from self._down.targets()

    def bind(self) -> None:
        self._gate_up_product, self._down_product = self._gate_up.bind(), self._down.bind()

    def forward(self, ops: Ops[Buf], x: Buf) -> Buf:
        """x: [T, hidden_size] -> [T, hidden_size], token by token."""
        inner = ops.gated(ops.linear(x, self._gate_up_product, "gate_up"), self._activation)
        inner = ops.gather(inner, *self._inner)
        return ops.gather(ops.linear(inner, self._down_product, "down"), *self._hidden)

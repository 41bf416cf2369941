"""The gated MLP (Shazeer 2020) as a part of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quire.kernels.ops import Buf, Ops
from quire.layers.linear import Linear, LinearMethod, LinearPart
from quire.layers.parameter import WeightTarget
from quire.layers.spec import MlpSpec


class Mlp:
    """One layer's. Usable once every target has been loaded and `bind()` called."""

    def __init__(
        self,
        spec: MlpSpec,
        prefix: str,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        method: LinearMethod,
    ) -> None:
        inner = spec.intermediate_size
        parts = {"gate_proj": inner, "up_proj": inner}
        if spec.fused_gate_up:
            parts = {"gate_up_proj": 2 * inner}
        self._activation = spec.activation
        self._gate_up = Linear(
            [LinearPart(f"{prefix}.{name}", size) for name, size in parts.items()],
            in_features=hidden_size,
            bias=spec.bias,
            dtype=dtype,
            method=method,
        )
        self._down = Linear(
            [LinearPart(f"{prefix}.down_proj", hidden_size)],
            in_features=inner,
            bias=spec.bias,
            dtype=dtype,
            method=method,
        )

    def targets(self) -> Iterator[WeightTarget]:
        yield from self._gate_up.targets()
        yield from self._down.targets()

    def bind(self) -> None:
        self._gate_up_product, self._down_product = self._gate_up.bind(), self._down.bind()

    def forward(self, ops: Ops[Buf], x: Buf) -> Buf:
        """x: [T, hidden_size] -> [T, hidden_size], token by token."""
        inner = ops.gated(ops.linear(x, self._gate_up_product, "gate_up"), self._activation)
        return ops.linear(inner, self._down_product, "down")

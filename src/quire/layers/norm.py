"""RMSNorm (Zhang and Sennrich 2019), alone or fused with the residual addition before it."""

from __future__ import annotations

import torch

from quire.layers.parameter import WeightTarget


class RMSNorm:
    """The weight of one norm. The arithmetic is `Kernels.rms_norm` and `Kernels.add_rms_norm`."""

    def __init__(
        self, name: str, *, size: int, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def targets(self) -> list[WeightTarget]:
        shape = (self.weight.shape[0],)
        return [WeightTarget(name=f"{self.name}.weight", shape=shape, load=self._load, kind="norm")]

    def _load(self, first: int, values: torch.Tensor) -> None:
        self.weight[first : first + len(values)] = values

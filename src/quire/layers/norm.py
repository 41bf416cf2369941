"""RMSNorm (Zhang and Sennrich 2019): the weight of one norm."""

from __future__ import annotations

import torch

from quire.kernels.ops import NormWeight
from quire.layers.parameter import WeightTarget
from quire.layers.spec import NormSpec

NORM_NAMES = {
    # placement: names of the norms before and after attention, before and after the MLP
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class RMSNorm:
    """The weight of a norm; `Ops.norm` computes it."""

    def __init__(
        self, name: str, *, size: int, spec: NormSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._name = name
        self._plus_one = spec.plus_one
        kept = torch.float32 if spec.order == "scale_then_round" else dtype
        weight = torch.empty(size, dtype=kept, device=device)
        self.weight = NormWeight(weight, spec.eps)

    def targets(self) -> list[WeightTarget]:
        return [
            WeightTarget(
                name=f"{self._name}.weight",
                shape=(self.weight.weight.shape[0],),
                load=self._load,
                kind="bias" if self._plus_one else "norm",  # random weights are then 0, or 1
            )
        ]

    def _load(self, first: int, values: torch.Tensor) -> None:
        if self._plus_one:
            values = 1.0 + values.float()
        self.weight.weight[first : first + len(values)] = values

"""Token embedding."""

from __future__ import annotations

import torch

from quire.kernels.memory import copy_rows
from quire.layers.parameter import WeightTarget


class Embedding:
    """[num_tokens] ids -> [num_tokens, hidden_size] rows of its own matrix.

    A lookup copies rows, so it is exact whatever the batch. A model whose head shares the matrix looks
    rows up in the head's product (`LinearProduct.rows`) and has no `Embedding`.
    """

    def __init__(
        self,
        name: str,
        *,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = name
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def targets(self) -> list[WeightTarget]:
        shape = (self.weight.shape[0], self.weight.shape[1])
        return [WeightTarget(name=f"{self.name}.weight", shape=shape, load=self._load)]

    def _load(self, first: int, rows: torch.Tensor) -> None:
        kept = self.weight[first : first + len(rows)]
        if kept.is_cpu:
            copy_rows(rows, kept)
        else:
            kept.copy_(rows)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.weight, 0, input_ids)

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
        own: range | None = None,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """own: ids of the tokens whose rows it has; None: all."""
        self.name = name
        self._vocab_size, self._own = vocab_size, range(vocab_size) if own is None else own
        self.weight = torch.empty(len(self._own), hidden_size, dtype=dtype, device=device)

    def targets(self) -> list[WeightTarget]:
        shape = (self._vocab_size, self.weight.shape[1])
        return [WeightTarget(f"{self.name}.weight", shape, self._load, taken=(self._own,))]

    def _load(self, first: int, rows: torch.Tensor) -> None:
        kept = self.weight[first : first + len(rows)]
        if kept.is_cpu:
            copy_rows(rows, kept)
        else:
            kept.copy_(rows)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.weight, 0, input_ids)

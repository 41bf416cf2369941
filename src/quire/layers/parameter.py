"""A tensor that a layer needs from a checkpoint: its name, its shape, and the function that loads it.

Layers describe the tensors they need and do not depend on files. The reader in `quire.weights` loads the
tensors and does not depend on layers. The whole model is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from quire.dtypes import FLOATS


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One tensor of the checkpoint, and who loads it.

    `load(first, rows)` gets the rows (indices of the first dimension) from `first` on, contiguous and in
    the dtype of the file. It may be called for some rows at a time, in any order, and from several
    threads for different rows. It must copy the rows, because their buffer is reused.
    """

    name: str
    shape: tuple[int, ...]
    """In the checkpoint."""
    load: Callable[[int, torch.Tensor], None]
    kind: Literal["weight", "bias", "norm"] = "weight"
    """The kind of random weights: small normal, zero, or one."""
    dtypes: tuple[str, ...] = FLOATS
    """The dtypes that it may have in the file, by the names of `quire.dtypes`."""
    taken: tuple[range, ...] | None = None
    """The indices of each dimension that `load` is given, counted from the first of them; None for all."""

    def give(self, first: int, rows: torch.Tensor) -> None:
        """Load the wanted part of the tensor's rows from `first` on."""
        if self.taken is None:
            self.load(first, rows)
            return
        wanted, *others = self.taken
        begin, end = max(first, wanted.start), min(first + len(rows), wanted.stop)
        if begin >= end:
            return
        rows = rows[begin - first : end - first]
        for dim, indices in enumerate(others, 1):
            rows = rows.narrow(dim, indices.start, len(indices))
        self.load(begin - wanted.start, rows.contiguous())

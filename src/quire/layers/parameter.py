"""What a layer asks of a checkpoint: one tensor, by name and shape, and where to put it.

Layers describe what they need and stay ignorant of files; the reader in `quire.weights` streams tensors to
whoever asked and stays ignorant of layers. Neither ever holds the whole model twice.
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

    `load(first, rows)` takes the rows (indices of the first dimension) from `first` on, contiguous and in
    the dtype they are stored in. It may be called for a part of the rows at a time, in any order, and from
    several threads for different rows. It copies what it keeps: what it is given is a buffer that will be
    filled anew.
    """

    name: str
    shape: tuple[int, ...]
    """In the checkpoint."""
    load: Callable[[int, torch.Tensor], None]
    kind: Literal["weight", "bias", "norm"] = "weight"
    """What random weights should look like: small normal, zero, or one."""
    dtypes: tuple[str, ...] = FLOATS
    """Which it may be stored in, by the names of `quire.dtypes`."""
    taken: tuple[range, ...] | None = None
    """The indices of each dimension that `load` is given, counted from the first of them; None for all."""

    def give(self, first: int, rows: torch.Tensor) -> None:
        """Load what is wanted of the tensor's rows from `first` on."""
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

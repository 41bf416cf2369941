"""What a layer asks of a checkpoint: one tensor, by name and shape, and where to put it.

Layers describe what they need and stay ignorant of files; the reader in `quire.weights` streams tensors to
whoever asked and stays ignorant of layers. Neither ever holds the whole model twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One tensor of the checkpoint and its taker.

    `load(first, rows)` takes the rows (indices of the first dimension) from `first` on. It may be
    called for a part of the rows at a time, in any order, and from several threads for different rows.
    It copies what it keeps: what it is given is a buffer that will be filled anew.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[int, torch.Tensor], None]
    kind: Literal["weight", "bias", "norm"] = "weight"
    """What random weights should look like: small normal, zero, or one."""

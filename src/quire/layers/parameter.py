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

    `load` copies what it keeps: the tensor it is given may be a view of a memory-mapped file that
    is about to go.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], None]
    kind: Literal["weight", "bias", "norm"] = "weight"
    """What random weights should look like: small normal, zero, or one."""

"""Reading an adapter's tensors (`quire.weights.adapter` has checked what they are)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quire.weights.adapter import AdaptedMatrix, AdapterInfo


class AdapterTensors(NamedTuple):
    """Of one matrix, in the model's dtype; `AdaptedMatrix` explains them. Finite."""

    matrix: AdaptedMatrix
    a: Tensor
    """[rank, inputs]"""
    b: Tensor
    """[outputs, rank]"""
    magnitude: Tensor | None
    """[outputs] float32"""


def read_adapter(directory: Path, info: AdapterInfo, dtype: torch.dtype) -> list[AdapterTensors]:
    """All tensors. Raises `CheckpointError` if a value is not finite in `dtype`, or a file has changed since
    `check_adapter`."""
    raise NotImplementedError

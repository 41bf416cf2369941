"""Reading an adapter's tensors; `quire.weights.adapter` has the checks that need none of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.weights.adapter import AdaptedMatrix, AdaptedModel, AdapterFile, AdapterInfo
from quire.weights.source import TensorInfo


class AdapterTensors(NamedTuple):
    """Of one matrix; `AdaptedMatrix` explains them. Finite."""

    matrix: AdaptedMatrix
    a: Tensor
    """[rank, inputs] in the model's dtype"""
    b: Tensor
    """[outputs, rank] in the model's dtype"""
    magnitude: Tensor | None
    """[outputs] float32"""
    base: Tensor | None
    """The base model's matrix, as the file has it."""


def read_adapter(
    directory: Path, model: AdaptedModel, *, max_rank: int, dtype: torch.dtype
) -> tuple[AdapterInfo, list[AdapterTensors]]:
    """Checks and reads in one pass: the hash is of the bytes that the tensors are made of.

    Raises, besides what `check_adapter` does, `CheckpointError` if a value is not finite in `dtype`.
    """
    with AdapterFile(directory, model, max_rank=max_rank) as file:
        data = bytearray(file.num_bytes)
        file.read_bytes(0, memoryview(data))
    digest = file.digest()
    digest.update(memoryview(data))
    tensors = [
        AdapterTensors(
            matrix,
            _tensor(data, matrix.a, dtype),
            _tensor(data, matrix.b, dtype),
            None if matrix.magnitude is None else _tensor(data, matrix.magnitude, torch.float32),
            None if matrix.base is None else _tensor(data, matrix.base, None),
        )
        for matrix in file.matrices
    ]
    return file.info(digest), tensors


def _tensor(data: bytearray, info: TensorInfo, dtype: torch.dtype | None) -> Tensor:
    stored = getattr(torch, info.dtype)
    count = info.num_bytes // stored.itemsize
    tensor = torch.frombuffer(data, dtype=stored, count=count, offset=info.begin)
    tensor = tensor.view(info.shape)
    if dtype is None:
        return tensor
    tensor = tensor.to(dtype, copy=True)  # the buffer goes
    if not bool(torch.isfinite(tensor).all()):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{info.name} holds a value that is NaN or infinite in {kind}: the adapter is damaged or "
            "was trained badly"
        )
    return tensor

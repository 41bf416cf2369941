"""A tensor of a checkpoint, whole."""

from __future__ import annotations

import torch

from quire.weights.source import Checkpoint


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    checkpoint.read(info, 0, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return tensor

"""One quantized matrix through its format's reader, dequantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from quire.kernels.select import create_kernels
from quire.quantization import read_method
from quire.quantization.base import LinearPart, LinearShape
from quire.quantization.matrix import QuantizedMethod

DATA = Path(__file__).parents[1] / "data" / "quantized"
NAME = "model.layers.0.self_attn.k_proj"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Golden:
    kind: str
    config: Mapping[str, object]
    shape: tuple[int, int]
    sha: str
    tensors: Tensors


def golden(file: str) -> list[Golden]:
    with safe_open(DATA / file, "pt") as opened:
        about = {kind: json.loads(text) for kind, text in opened.metadata().items()}
        names = list(opened.keys())
        return [
            Golden(
                kind,
                entry["config"],
                tuple(entry["shape"]),
                entry["sha"],
                {n.partition("/")[2]: opened.get_tensor(n) for n in names if n.startswith(f"{kind}/")},
            )
            for kind, entry in sorted(about.items())
        ]  # fmt: skip


def headers(tensors: Tensors, name: str = NAME) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        f"{name}.{suffix}": (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for suffix, tensor in tensors.items()
    }


def method_of(config: Mapping[str, object], tensors: Tensors) -> QuantizedMethod:
    method = read_method({**config, "tensors": headers(tensors)})
    assert isinstance(method, QuantizedMethod)
    return method


def dequantized(
    config: Mapping[str, object],
    tensors: Tensors,
    shape: Sequence[int],
    *,
    step: int = 64,
    outputs: range | None = None,
) -> torch.Tensor:
    """Read like a file: `step` rows at a time, the last ones first."""
    method = method_of(config, tensors)
    whole = LinearShape(shape[1], (LinearPart(NAME, shape[0], outputs),), bias=False)
    state = method.create(whole, dtype=torch.float32, kernels=create_kernels("reference"))
    wants = {want.suffix: want for want in state.wants(whole.parts[0])}
    assert set(wants) == set(tensors)
    for suffix, tensor in tensors.items():
        want = wants[suffix]
        assert tuple(tensor.shape) == want.shape, (suffix, want)
        assert str(tensor.dtype).removeprefix("torch.") in want.dtypes, (suffix, want)
        taken = want.taken or ()
        for dim, indices in enumerate(taken):
            if tensor.dim():
                tensor = tensor.narrow(dim, indices.start, len(indices))
        tensor = (tensor if tensor.dim() else tensor.reshape(1)).contiguous()
        for first in reversed(range(0, len(tensor), step)):
            state.load(0, suffix, first, tensor[first : first + step].contiguous())
    product = state.finish()
    assert method.weight_bytes(whole, 4) > 0
    return product.rows(torch.arange(len(whole.parts[0].outputs)))


def sha(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()[:16]

"""Streaming tensors to their takers: everything is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.errors import CheckpointError
from quire.layers.parameter import WeightTarget
from quire.weights.load import load_random_weights, load_weights
from quire.weights.safetensors_reader import Checkpoint


class Takers:
    """Targets that copy what they are given, and remember."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.targets = [self.target(name, shape) for name, shape in shapes.items()]

    def target(self, name: str, shape: tuple[int, ...]) -> WeightTarget:
        def load(tensor: torch.Tensor) -> None:
            self.loaded[name] = tensor.clone()

        kind = "norm" if "norm" in name else "bias" if "bias" in name else "weight"
        return WeightTarget(name=name, shape=shape, load=load, kind=kind)


def checkpoint(directory: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


def test_each_tensor_reaches_its_taker(tmp_path: Path) -> None:
    takers = Takers(a=(2, 3), b=(4,))
    a, b = torch.randn(2, 3), torch.randn(4)
    with checkpoint(tmp_path, a=a, b=b) as source:
        load_weights(takers.targets, source)
    assert torch.equal(takers.loaded["a"], a) and torch.equal(takers.loaded["b"], b)


def test_a_tensor_with_two_takers_reaches_both(tmp_path: Path) -> None:
    first, second = Takers(a=(3,)), Takers(a=(3,))
    with checkpoint(tmp_path, a=torch.ones(3)) as source:
        load_weights([*first.targets, *second.targets], source)
    assert torch.equal(first.loaded["a"], second.loaded["a"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2, 3)}, "lacks tensor b"),
        ({"a": torch.ones(3, 2), "b": torch.ones(4)}, r"tensor a .*\[3, 2\].*\[2, 3\]"),
        ({"a": torch.ones(6), "b": torch.ones(4)}, r"tensor a .*\[6\].*\[2, 3\]"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, "tensor b .*I8.*unquantized"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4), "lora": torch.ones(1)}, "has tensor lora"),
    ],
)  # fmt: skip
def test_mismatch_is_reported_before_anything_is_loaded(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    takers = Takers(a=(2, 3), b=(4,))
    with checkpoint(tmp_path, **tensors) as source, pytest.raises(CheckpointError, match=message):
        load_weights(takers.targets, source)
    assert not takers.loaded


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    takers = Takers(a=(1,))
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extras = {inv_freq: torch.ones(4), "lm_head.weight": torch.ones(2)}
    with checkpoint(tmp_path, a=torch.ones(1), **extras) as source:
        load_weights(takers.targets, source, ignored=("lm_head.weight",))
    assert set(takers.loaded) == {"a"}


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    def weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        takers = Takers(**shapes)
        load_random_weights(takers.targets, dtype=torch.float32, seed=seed)
        return takers.loaded

    first = weights(1, a=(64, 64), b=(64, 64), norm=(8,), bias=(8,))
    assert torch.equal(first["a"], weights(1, a=(64, 64))["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], weights(2, a=(64, 64))["a"])
    assert first["a"].std() == pytest.approx(0.02, rel=0.1)
    assert first["norm"].eq(1).all() and first["bias"].eq(0).all()

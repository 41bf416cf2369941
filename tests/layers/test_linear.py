"""Fused linear layers: the parts in their places, biases added, loading in any order."""

from __future__ import annotations

import random

import pytest
import torch

from quire.kernels.reference import ReferenceKernels
from quire.layers.linear import Linear
from quire.quantization.base import LinearPart, LinearShape
from quire.quantization.unquantized import UNQUANTIZED

PARTS = (LinearPart("q", 24), LinearPart("k", 8), LinearPart("v", 8))


def build(*, bias: bool, dtype: torch.dtype = torch.float32) -> Linear:
    shape = LinearShape(16, PARTS, bias=bias)
    return Linear(shape, dtype=dtype, method=UNQUANTIZED, kernels=ReferenceKernels())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_fused_product_is_the_parts_side_by_side(bias: bool, seed: int) -> None:
    linear = build(bias=bias)
    torch.manual_seed(seed)
    tensors = {target.name: torch.randn(target.shape) for target in linear.targets()}
    targets = linear.targets()
    random.Random(seed).shuffle(targets)
    for target in targets:
        target.load(0, tensors[target.name])
    x = torch.randn(5, 16)
    expected = [
        torch.nn.functional.linear(x, tensors[f"{part.name}.weight"], tensors.get(f"{part.name}.bias"))
        for part in PARTS
    ]  # fmt: skip
    torch.testing.assert_close(linear.bind()(x), torch.cat(expected, dim=1))


def test_loading_copies_and_converts() -> None:
    linear = build(bias=False, dtype=torch.bfloat16)
    given = [torch.randn(target.shape) for target in linear.targets()]
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = x.float() @ torch.cat(given).bfloat16().float().T
    for target, tensor in zip(linear.targets(), given, strict=True):
        target.load(0, tensor)
        tensor.fill_(float("nan"))
    out = linear.bind()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_layer_is_unusable_until_every_tensor_came() -> None:
    linear = build(bias=False)
    for target in linear.targets()[:2]:
        target.load(0, torch.zeros(target.shape))
    with pytest.raises(AssertionError, match="not loaded"):
        linear.bind()

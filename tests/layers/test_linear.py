"""Fused linear layers: the parts in their places, biases added, loading in any order, one format
behind the seam.
"""

from __future__ import annotations

import random

import pytest
import torch

from quire.kernels.reference import ReferenceKernels
from quire.layers.linear import Linear, LinearPart, LinearShape, UnquantizedLinearMethod

PARTS = [LinearPart("q", 24), LinearPart("k", 8), LinearPart("v", 8)]


def build(*, bias: bool, dtype: torch.dtype = torch.float32) -> Linear:
    method = UnquantizedLinearMethod(ReferenceKernels())
    return Linear(PARTS, in_features=16, bias=bias, dtype=dtype, method=method)


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
    torch.testing.assert_close(linear(x), torch.cat(expected, dim=1))


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


def test_another_weight_format_fits_behind_the_seam() -> None:
    """A format with two tensors per part: int8 rows and their scales."""

    class Int8State:
        def __init__(self, shape: LinearShape) -> None:
            self.shape = shape
            self.rows: dict[tuple[int, str], torch.Tensor] = {}

        def tensors(self, part: LinearPart) -> dict[str, tuple[int, ...]]:
            size = part.out_features
            return {"qweight": (size, self.shape.in_features), "scales": (size, 1)}

        def load(self, index: int, suffix: str, first: int, tensor: torch.Tensor) -> None:
            self.rows[index, suffix] = tensor.clone()

        def apply(self):
            count = range(len(self.shape.parts))
            weight = torch.cat([self.rows[i, "qweight"] * self.rows[i, "scales"] for i in count])
            return lambda x: x @ weight.T

    class Int8Method:
        def create(self, shape: LinearShape) -> Int8State:
            return Int8State(shape)

    linear = Linear(PARTS, in_features=16, bias=False, dtype=torch.float32, method=Int8Method())
    assert [target.name for target in linear.targets()][:2] == ["q.qweight", "q.scales"]
    for target in linear.targets():
        target.load(0, torch.full(target.shape, 2.0))
    assert linear(torch.ones(1, 16)).unique().tolist() == [64.0]

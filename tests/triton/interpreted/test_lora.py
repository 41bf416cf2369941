"""Adapters on a GPU: what is added to a product, and that a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.checks import KernelArgumentError
from quire.kernels.dequantize import SideBySide
from quire.kernels.triton.backend import TritonKernels
from quire.kernels.triton.lora import DeviceAdapters
from tests.kernels.cases import ULP, bits, generator, randn
from tests.kernels.test_lora_cpu import bias_of, deltas, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_deltas_are_added_to_the_rounded_product(
    dtype: torch.dtype, scaled: bool, side_by_side: bool
) -> None:
    sizes, k, rows = (70, 33, 65), 90, 37
    kernels = TritonKernels(torch.device("cpu"), batch_invariant=True)
    made = []
    for n in sizes if side_by_side else (sum(sizes),):
        product = kernels.linear(in_features=k, out_features=n, dtype=dtype, bias=True)
        product.fill(0, randn(n, k, rng=generator(n), dtype=dtype))
        product.fill_bias(0, randn(n, rng=generator(n + 1), dtype=dtype))
        made.append(product)
    product = SideBySide(made) if side_by_side else made[0]
    adapters = kernels.adapters(
        [product, product], dtype=dtype, capacity=3, max_rank=40, parts=[sizes, (1,), (1,)]
    )
    given = [deltas(sizes, k, dtype, seed, scaled) for seed in (1, 2)]
    adapters.put(0, adapters.pack({0: given[1]}))  # replaced
    for index, each in enumerate(given):
        adapters.put(index, adapters.pack({0: each}))
    adapters.put(2, adapters.pack({}))
    x = randn(rows, k, rng=generator(5), dtype=dtype)
    chosen = torch.randint(-1, 3, (rows,), generator=generator(6), dtype=torch.int32)
    actual = adapters.rows(chosen).linear(0, product, x)
    base, bias = product(x), bias_of(product)
    for row, index in enumerate(chosen.tolist()):
        if index in (-1, 2):
            assert torch.equal(bits(actual[row]), bits(base[row]))
            continue
        wanted = expected(base[row : row + 1], bias, x[row : row + 1], given[index])[0]
        bound = 1e-4 + 4 * ULP[dtype] * (wanted.abs() + base[row].double().abs() + bias.abs())
        assert bool(((actual[row].double() - wanted).abs() <= bound).all())
    for row in (0, 20, 36):
        alone = adapters.rows(chosen[row : row + 1]).linear(0, product, x[row : row + 1])
        assert torch.equal(bits(alone[0]), bits(actual[row]))
    kept = adapters.rows(chosen).keep(torch.tensor([3, 9]))
    assert torch.equal(bits(kept.linear(0, product, x[[3, 9]])), bits(actual[[3, 9]]))


def test_heads_and_embeddings_are_refused() -> None:
    kernels = TritonKernels(torch.device("cpu"))
    product = kernels.linear(in_features=8, out_features=8, dtype=torch.float32, bias=False)
    adapters = kernels.adapters(
        [product, product], dtype=torch.float32, capacity=1, max_rank=8, parts=[(8,), (8,), (8,)]
    )
    assert isinstance(adapters, DeviceAdapters)
    with pytest.raises(KernelArgumentError, match="on the CPU only"):
        adapters.pack({1: []})

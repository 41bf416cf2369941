"""The product of `--batch-invariant`: right, and each row's bits are its own."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.triton import matmul as module
from quire.kernels.triton.matmul import matmul
from tests.kernels.cases import DTYPES, ULP, bits, dtypes, generator, randn, seeds


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(bits(actual), bits(expected))


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(seed)
    shapes = ((m, k), (n, k), (n,))
    x, weight, bias = (randn(*shape, rng=rng, dtype=dtype) for shape in shapes)
    return x, weight, bias


@settings(max_examples=20)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 150),
    k=st.integers(1, 150),
    biased=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_small_and_odd_shapes(
    m: int, n: int, k: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    x, weight, added = operands(m, n, k, dtype, seed=seed)
    bias = added if biased else None
    actual = matmul(x, weight, bias)
    expected = x.double() @ weight.double().T + (added.double() if biased else 0.0)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=ULP[dtype], atol=1e-4)
    for i in range(0, m, 11):
        assert_same_bits(matmul(x[i : i + 1].clone(), weight, bias), actual[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_its_bits_in_every_batch_and_in_every_place(dtype: torch.dtype) -> None:
    """As many rows as fill one tile, and one more; the row is the first, the last, and in between."""
    x, weight, bias = operands(1, 140, 200, dtype)
    alone = matmul(x, weight, bias)
    others = operands(129, 1, 200, dtype, seed=1)[0]
    for rows in (2, 16, 32, 33, 128, 129):
        for place in {0, rows // 2, rows - 1}:
            batch = torch.cat([others[:place], x, others[place : rows - 1]])
            assert_same_bits(matmul(batch, weight, bias)[place], alone[0])


def test_every_tile_of_a_large_product_is_computed() -> None:
    """More rows of tiles than go through the weight together, and a last group of fewer."""
    rows = module.FLOAT32.m * (module.GROUP + 2) + 5
    x, weight, _ = operands(rows, 3 * module.FLOAT32.n + 7, 40, torch.float32)
    actual = matmul(x, weight)
    torch.testing.assert_close(actual, x @ weight.T, rtol=1e-5, atol=1e-4)
    assert_same_bits(matmul(x[-9:].clone(), weight), actual[-9:])


def test_rows_of_nan_spoil_no_others() -> None:
    x, weight, _ = operands(3, 5, 70, torch.float32)
    expected = matmul(x, weight)[::2]
    x[1] = torch.nan
    assert_same_bits(matmul(x, weight)[::2], expected)


def test_another_order_of_sums_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above could not do if sums came out the same in any order."""
    x, weight, _ = operands(5, 64, 200, torch.float32)
    expected = matmul(x, weight)
    monkeypatch.setattr(module, "FLOAT32", replace(module.FLOAT32, k=16))
    assert not torch.equal(matmul(x, weight), expected)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(2, 3).int(), torch.ones(4, 3), None, "x is torch.int32"),
        (torch.ones(2, 3), torch.ones(4, 2), None, "weight is torch.float32 (4, 2)"),
        (torch.ones(2, 3), torch.ones(4, 3).half(), None, "weight is torch.float16"),
        (torch.ones(3), torch.ones(4, 3), None, "need 2-D"),
        (torch.ones(2, 6)[:, ::2], torch.ones(4, 3), None, "x is torch.float32 (2, 3) with strides"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), "bias is torch.float32 (3,)"),
        (torch.ones(7)[1:].view(2, 3), torch.ones(4, 3), None, "from a multiple of 16"),
    ],
)  # fmt: skip
def test_wrong_operands(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=re.escape(message)):
        matmul(x, weight, bias)

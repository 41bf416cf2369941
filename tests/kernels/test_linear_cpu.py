"""The promise that the engine's exactness rests on: a row's bits do not depend on the batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.linear_cpu import NativeLinear, PackedLinear, PlainLinear
from tests.kernels.cases import DTYPES, ULP, bits, dtypes, generator, randn, seeds

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 100]
BACKENDS: dict[str, Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]] = {
    "packed": PackedLinear.pack,
    "native": NativeLinear,
    "plain": PlainLinear,
}


def assert_invariant(linear: Callable[[Tensor], Tensor], x: Tensor, rows: list[int]) -> None:
    """x in pieces of every number of rows gives the bits of x whole."""
    whole = bits(linear(x))
    for m in rows:
        pieces = torch.cat([linear(x[i : i + m]) for i in range(0, len(x), m)])
        assert torch.equal(bits(pieces), whole), f"{m} rows at a time differ"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(k=st.integers(1, 130), n=st.integers(1, 130), bias=st.booleans(), dtype=dtypes, seed=seeds)
def test_small_and_odd_shapes(
    native: NativeKernels, backend: str, k: int, n: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    weight, x = randn(n, k, rng=rng, dtype=dtype), randn(37, k, rng=rng, dtype=dtype)
    b = randn(n, rng=rng, dtype=dtype) if bias else None
    expected = x.double() @ weight.double().t() + (b.double() if b is not None else 0.0)
    linear = BACKENDS[backend](weight.clone(), b)
    actual = linear(x)
    assert actual.dtype == dtype and actual.shape == (37, n)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * ULP[dtype], atol=1e-4)
    assert_invariant(linear, x, [1, 2, 3, 5, 8, 16, 19])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(768, 256), (2048, 192), (3072, 96), (4095, 33)])
def test_model_shapes(
    native: NativeKernels,
    backend: str,
    dtype: torch.dtype,
    k: int,
    n: int,
    with_threads: Callable[[int, Callable[[], Tensor]], Tensor],
) -> None:
    if backend == "plain" and dtype == torch.float16:
        pytest.skip("the same code as in the other dtypes, and very slow")
    rng = generator(k)
    weight, x = randn(n, k, rng=rng).mul(0.05).to(dtype), randn(200, k, rng=rng, dtype=dtype)
    linear = BACKENDS[backend](weight, None)
    one = with_threads(1, lambda: linear(x))
    assert_invariant(linear, x, ROWS)
    two = with_threads(2, lambda: linear(x))
    assert torch.equal(bits(one), bits(two))
    assert_invariant(linear, x, ROWS)


def test_a_slice_of_rows_and_no_rows(native: NativeKernels) -> None:
    rng = generator(0)
    for dtype in DTYPES:
        weight = randn(24, 40, rng=rng, dtype=dtype)
        fused = randn(9, 100, rng=rng, dtype=dtype)
        linear = PackedLinear.pack(weight)
        strided = fused[:, 30:70]
        assert torch.equal(bits(linear(strided)), bits(linear(strided.contiguous())))
        assert linear(strided[:0]).shape == (0, 24)
        assert linear(strided[:1]).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_given_up(native: NativeKernels, dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    gone = weakref.ref(weight)
    linear = PackedLinear.pack(weight)
    del weight
    gc.collect()
    assert gone() is None
    assert float(linear(torch.ones(1, 64, dtype=dtype))[0, 0]) == 64.0


def test_what_it_refuses(native: NativeKernels) -> None:
    with pytest.raises(KernelArgumentError):
        PackedLinear.pack(torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(KernelArgumentError):
        PackedLinear.pack(torch.ones(4, 6).t())
    with pytest.raises(KernelArgumentError):
        PackedLinear.pack(torch.ones(4, 6), torch.ones(6))
    with pytest.raises(KernelArgumentError):
        PackedLinear.pack(torch.ones(4, 0))
    linear = PackedLinear.pack(torch.ones(4, 6))
    for x in (torch.ones(2, 5), torch.ones(6), torch.ones(2, 6).half(), torch.ones(6, 2).t()):
        with pytest.raises(KernelArgumentError):
            linear(x)

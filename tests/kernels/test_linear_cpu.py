"""The promise that the engine's exactness rests on: a row's bits do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.linear import (
    CProduct,
    CPUProduct,
    ExactSumProduct,
    PanelProduct,
)
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import DTYPES, ULP, bits, dtypes, generator, randn, seeds

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 100]


def filled(kind: type[CPUProduct], weight: Tensor, bias: Tensor | None) -> CPUProduct:
    n, k = weight.shape
    linear = kind(in_features=k, out_features=n, dtype=weight.dtype, bias=bias is not None)
    linear.fill(0, weight)
    if bias is not None:
        linear.fill_bias(0, bias)
    return linear


def panels(weight: Tensor, bias: Tensor | None) -> CPUProduct:
    try:
        return filled(PanelProduct, weight, bias)
    except BuildError:
        pytest.skip("no native kernels here")


def exact_sums(weight: Tensor, bias: Tensor | None) -> CPUProduct:
    return filled(ExactSumProduct, weight, bias)


PRODUCTS = {"panels": panels, "exact-sums": exact_sums}


def assert_invariant(linear: Callable[[Tensor], Tensor], x: Tensor, rows: list[int]) -> None:
    """x in pieces of every number of rows gives the bits of x whole."""
    whole = bits(linear(x))
    for m in rows:
        pieces = torch.cat([linear(x[i : i + m]) for i in range(0, len(x), m)])
        assert torch.equal(bits(pieces), whole), f"{m} rows at a time differ"


@pytest.mark.parametrize("product", PRODUCTS)
@settings(max_examples=25)
@given(k=st.integers(1, 130), n=st.integers(1, 130), bias=st.booleans(), dtype=dtypes, seed=seeds)
def test_small_and_odd_shapes(
    product: str, k: int, n: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    weight, x = randn(n, k, rng=rng, dtype=dtype), randn(37, k, rng=rng, dtype=dtype)
    b = randn(n, rng=rng, dtype=dtype) if bias else None
    expected = x.double() @ weight.double().t() + (b.double() if b is not None else 0.0)
    linear = PRODUCTS[product](weight.clone(), b)
    actual = linear(x)
    assert actual.dtype == dtype and actual.shape == (37, n)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * ULP[dtype], atol=1e-4)
    assert_invariant(linear, x, [1, 2, 3, 5, 8, 16, 19])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(768, 256), (2048, 192), (3072, 96), (4095, 33)])
def test_model_shapes(
    product: str,
    dtype: torch.dtype,
    k: int,
    n: int,
    with_threads: Callable[[int, Callable[[], Tensor]], Tensor],
) -> None:
    rng = generator(k)
    weight, x = randn(n, k, rng=rng).mul(0.05).to(dtype), randn(200, k, rng=rng, dtype=dtype)
    linear = PRODUCTS[product](weight, None)
    one = with_threads(1, lambda: linear(x))
    two = with_threads(2, lambda: linear(x))
    assert torch.equal(bits(one), bits(two))
    if product == "exact-sums":  # slow, and proven below
        assert_invariant(linear, x[:40], [1, 2, 3, 16, 17])
    else:
        with_threads(1, lambda: assert_invariant(linear, x, ROWS))
        assert_invariant(linear, x, ROWS)


def moody_matmul(left: Tensor, right: Tensor) -> Tensor:
    """A library whose sums depend on how many rows there are, and on a row's place: as PyTorch's do on some
    processors. [M, K] @ [K, N], in float64."""
    rows, k = left.shape
    out = torch.empty(rows, right.shape[1], dtype=left.dtype)
    for i, row in enumerate(left):
        order = torch.randperm(k, generator=generator(rows * 1000 + i))
        products = row[order, None] * right[order]
        out[i] = sum(chunk.sum(0) for chunk in products.chunk(2 + (rows + i) % 7))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(48, 21), (4095, 3)])
def test_exact_sums_does_not_depend_on_how_a_library_adds(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, k: int, n: int
) -> None:
    rng = generator(k)
    weight, x = randn(n, k, rng=rng, dtype=dtype), randn(20, k, rng=rng, dtype=dtype)
    x[3] *= 1000.0  # rows and columns of other sizes, elements far below the largest, zeros
    x[:, 5] *= 300.0
    weight[1] *= 1e-4
    x[7, :-1] = 0.0
    weight[2] = -0.0
    weight[0, :9] *= 1e-6
    linear = exact_sums(weight, randn(n, rng=rng, dtype=dtype))
    whole = bits(linear(x))
    a, b = x.double() / 3, weight.double().t() / 3
    assert not torch.equal(moody_matmul(a, b)[:4], moody_matmul(a[:4], b)), "not moody enough"
    monkeypatch.setattr(torch, "matmul", moody_matmul)
    for m in (1, 2, 7, 16, 20):
        pieces = torch.cat([linear(x[i : i + m]) for i in range(0, len(x), m)])
        assert torch.equal(bits(pieces), whole), f"{m} rows at a time differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 512, 9000])
def test_exact_sums_is_as_exact_as_the_dtype(dtype: torch.dtype, k: int) -> None:
    """Also where one element of a row is a thousand times the others, as activations of models are."""
    rng = generator(k)
    weight, x = randn(40, k, rng=rng).mul(0.05).to(dtype), randn(6, k, rng=rng, dtype=dtype)
    x[::2, 0] = 1000.0
    expected = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()  # what a sum in float32 is as exact as
    error = (exact_sums(weight, None)(x).double() - expected).abs()
    assert bool((error <= ULP[dtype] * expected.abs() + ULP[torch.float32] * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_sums_keeps_what_is_not_finite_in_its_row(dtype: torch.dtype) -> None:
    rng = generator(3)
    weight, x = randn(9, 40, rng=rng, dtype=dtype), randn(4, 40, rng=rng, dtype=dtype)
    expected = exact_sums(weight, None)(x)
    x[1, 3], x[2, 39] = torch.nan, torch.inf
    actual = exact_sums(weight, None)(x)
    assert torch.equal(bits(actual[[0, 3]]), bits(expected[[0, 3]]))
    assert not bool(actual[1:3].isfinite().any())


def test_a_slice_of_rows_and_no_rows(native: NativeKernels) -> None:
    rng = generator(0)
    for dtype in DTYPES:
        weight = randn(24, 40, rng=rng, dtype=dtype)
        fused = randn(9, 100, rng=rng, dtype=dtype)
        linear = panels(weight, None)
        strided = fused[:, 30:70]
        assert torch.equal(bits(linear(strided)), bits(linear(strided.contiguous())))
        assert linear(strided[:0]).shape == (0, 24)
        assert linear(strided[:1]).is_contiguous()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_arrive_one_by_one_make_the_whole(product: str, dtype: torch.dtype) -> None:
    """Parts end inside a panel of 64 columns, and come in any order."""
    rng = generator(1)
    sizes, k = (70, 10, 3, 64), 37
    weight, bias = randn(147, k, rng=rng, dtype=dtype), randn(147, rng=rng, dtype=dtype)
    x = randn(5, k, rng=rng, dtype=dtype)
    linear = PRODUCTS[product](torch.zeros_like(weight), torch.zeros_like(bias))
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    for i in (2, 0, 3, 1):
        linear.fill(first[i], weight[first[i] : first[i] + sizes[i]])
        linear.fill_bias(first[i], bias[first[i] : first[i] + sizes[i]])
    assert torch.equal(bits(linear(x)), bits(PRODUCTS[product](weight, bias)(x)))
    for ids in (
        torch.tensor([146, 0, 63, 64, 69, 70, 70]),
        torch.randint(147, (50,), generator=rng),
    ):
        assert torch.equal(linear.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [4096, 4097, 9000])
def test_sums_cut_along_k_are_one_chain(native: NativeKernels, dtype: torch.dtype, k: int) -> None:
    """A panel too long for the L2 cache is passed in pieces; the sums go on where they stopped."""
    rng = generator(k)
    x, weight = randn(9, k, rng=rng, dtype=dtype), randn(70, k, rng=rng, dtype=dtype)
    linear = panels(weight, None)
    expected = x.double() @ weight.double().t()
    scale = float(expected.abs().max())
    bound = 4 * ULP[dtype] + k**0.5 * ULP[torch.float32]  # the store, and k roundings at random
    torch.testing.assert_close(linear(x).double() / scale, expected / scale, rtol=0, atol=bound)
    assert_invariant(linear, x, [1, 2, 4, 8])


@pytest.mark.parametrize(
    ("march", "flag"), [("x86-64-v4", "avx512vl"), ("x86-64-v3", "avx2"), ("x86-64", "sse2")]
)
def test_processors_with_narrower_vectors_and_no_bfloat16(
    native: NativeKernels, march: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flag not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"this processor has no {flag}")
    library = load_library(march)
    monkeypatch.setattr("quire.kernels.cpu.library.load_library", lambda: library)
    monkeypatch.setenv("QUIRE_CPU_TILES", "off")
    rng = generator(2)
    for dtype in DTYPES:
        for n, k in ((130, 77), (64, 256)):
            weight, x = randn(n, k, rng=rng, dtype=dtype), randn(23, k, rng=rng, dtype=dtype)
            bias = randn(n, rng=rng, dtype=dtype)
            linear = panels(weight, bias)
            expected = x.double() @ weight.double().t() + bias.double()
            torch.testing.assert_close(linear(x).double(), expected, rtol=2 * ULP[dtype], atol=1e-4)
            assert_invariant(linear, x, [1, 2, 3, 5, 8, 16])
            ids = torch.tensor([n - 1, 0, 63])
            assert torch.equal(linear.rows(ids), weight[ids])


@pytest.mark.parametrize("product", PRODUCTS)
def test_invalid_rows_are_refused_before_anything_is_read(product: str) -> None:
    linear = PRODUCTS[product](torch.ones(5, 6), None)
    for bad in (-1, 5, 2**62, -(2**62)):
        with pytest.raises(KernelArgumentError):
            linear.rows(torch.tensor([0, bad]))
    for first, rows in ((-1, 2), (4, 2), (6, 1)):
        with pytest.raises(KernelArgumentError):
            linear.fill(first, torch.ones(rows, 6))


def test_a_product_that_c_can_compute_is_known_by_its_struct() -> None:
    weight = torch.ones(5, 6)
    assert isinstance(panels(weight, None), CProduct)
    assert not isinstance(exact_sums(weight, None), CProduct)


def test_what_it_refuses(native: NativeKernels) -> None:
    with pytest.raises(KernelArgumentError):
        panels(torch.ones(4, 4, dtype=torch.float64), None)
    with pytest.raises(KernelArgumentError):
        panels(torch.ones(4, 6).t(), None)
    with pytest.raises(KernelArgumentError):
        panels(torch.ones(4, 6), torch.ones(6))
    with pytest.raises(KernelArgumentError):
        panels(torch.ones(4, 0), None)
    linear = panels(torch.ones(4, 6), None)
    for x in (torch.ones(2, 5), torch.ones(6), torch.ones(2, 6).half(), torch.ones(6, 2).t()):
        with pytest.raises(KernelArgumentError):
            linear(x)

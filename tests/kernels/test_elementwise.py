from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import DTYPES, assert_close, bits, dtypes, generator, randn, seeds

widths = st.one_of(st.integers(1, 300), st.sampled_from([512, 768, 1024, 2048, 3072]))
rows = st.integers(0, 9)


@given(rows=rows, width=widths, dtype=dtypes, seed=seeds)
def test_rms_norm(
    native: NativeKernels, reference: Kernels, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    x = randn(rows, width, rng=rng, dtype=dtype) * 3
    weight = randn(width, rng=rng, dtype=dtype)
    # A unit in the last place before the weight, and one more after it.
    actual, plain = native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    assert_close(actual, plain, ulps=3)
    assert_rows_alone(lambda part: native.rms_norm(part, weight, 1e-5), x, actual)
    assert_rows_alone(lambda part: reference.rms_norm(part, weight, 1e-5), x, plain)


def test_rms_norm_is_the_formula(native: NativeKernels, reference: Kernels) -> None:
    x = torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[3.0, 8.0]]) / (12.5 + 1e-6) ** 0.5
    for kernels in (native, reference):
        assert_close(kernels.rms_norm(x, torch.tensor([1.0, 2.0]), 1e-6), expected, ulps=2)


@given(rows=rows, width=widths, dtype=dtypes, seed=seeds)
def test_add_rms_norm(
    native: NativeKernels, reference: Kernels, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    x = randn(rows, width, rng=rng, dtype=dtype)
    residual = randn(rows, width, rng=rng, dtype=dtype) * 5
    weight = randn(width, rng=rng, dtype=dtype)
    mine, theirs, summed = residual.clone(), residual.clone(), residual + x
    actual = native.add_rms_norm(x, mine, weight, 1e-5)
    assert_close(actual, reference.add_rms_norm(x, theirs, weight, 1e-5), ulps=3)
    assert torch.equal(bits(mine), bits(summed)) and torch.equal(bits(theirs), bits(summed))
    assert torch.equal(bits(actual), bits(native.rms_norm(summed, weight, 1e-5)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_in_a_fused_projection(
    native: NativeKernels, reference: Kernels, dtype: torch.dtype
) -> None:
    qkv = randn(5, 8 * 24, rng=generator(0), dtype=dtype)
    heads = qkv[:, 24 : 24 + 4 * 24].view(5, 4, 24)
    weight = randn(24, rng=generator(1), dtype=dtype)
    dense = native.rms_norm(heads.reshape(20, 24), weight, 1e-6).view(5, 4, 24)
    actual = native.rms_norm(heads, weight, 1e-6)
    assert torch.equal(bits(actual), bits(dense)) and actual.is_contiguous()
    assert_close(actual, reference.rms_norm(heads, weight, 1e-6), ulps=3)


@given(rows=rows, width=widths, dtype=dtypes, seed=seeds)
def test_silu_and_mul(
    native: NativeKernels, reference: Kernels, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    gate_up = randn(rows, 2 * width, rng=generator(seed)).mul(8).to(dtype)
    actual, plain = native.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    assert_close(actual, plain, ulps=4)
    assert_rows_alone(native.silu_and_mul, gate_up, actual)
    assert_rows_alone(reference.silu_and_mul, gate_up, plain)


def test_the_references_silu_does_not_depend_on_where_a_vector_ends(reference: Kernels) -> None:
    """PyTorch's differs in the last place between the elements that fill a vector and those left over."""
    gate_up = randn(200, 2 * 37, rng=generator(0)) * 4
    assert_rows_alone(reference.silu_and_mul, gate_up, reference.silu_and_mul(gate_up))


def test_silu_at_the_ends(native: NativeKernels) -> None:
    gate = torch.tensor([[0.0, -200.0, 200.0, -torch.inf, torch.inf, torch.nan, -1e-30, 88.0]])
    actual = native.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))
    expected = torch.tensor([[0.0, 0.0, 200.0, torch.nan, torch.inf, torch.nan, -5e-31, 88.0]])
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-40)


def test_wrong_tensors_raise(native: NativeKernels, reference: Kernels) -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    for kernels in (native, reference):
        for bad_x, bad_weight in (
            (x.double(), weight.double()),
            (x, weight.half()),
            (x, torch.ones(7)),
            (x.t(), torch.ones(4)),
            (x, torch.ones(16)[::2]),
            (x[0], weight),
        ):
            with pytest.raises(KernelArgumentError):
                kernels.rms_norm(bad_x, bad_weight, 1e-5)
        with pytest.raises(KernelArgumentError):
            kernels.add_rms_norm(x, torch.ones(3, 8), weight, 1e-5)
        with pytest.raises(KernelArgumentError):
            kernels.silu_and_mul(torch.ones(2, 7))


def assert_rows_alone(operation, x: torch.Tensor, whole: torch.Tensor) -> None:
    for i in range(len(x)):
        assert torch.equal(bits(operation(x[i : i + 1].clone())), bits(whole[i : i + 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(native: NativeKernels, dtype: torch.dtype, with_threads) -> None:
    x, weight = randn(64, 1000, rng=generator(0), dtype=dtype), torch.ones(1000, dtype=dtype)
    for operation in (lambda: native.rms_norm(x, weight, 1e-5), lambda: native.silu_and_mul(x)):
        results = [with_threads(threads, operation) for threads in (1, 2, 3)]
        assert all(torch.equal(bits(results[0]), bits(other)) for other in results[1:])

"""Products over matrices of codes: sums over the dequantized matrix, rows of it, and bits in every batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import dequantize, round_to_int8
from quire.kernels.triton import codes as module
from quire.kernels.triton.backend import TritonKernels
from quire.kernels.triton.codes import TritonCodes
from tests.kernels.cases import DTYPES, ULP, bits, generator, randn
from tests.kernels.test_codes_cpu import FORMS, random_matrix

FLOAT8 = {
    "fp8 rows": CodeFormat(bits=8, float8=True),
    "fp8 g128": CodeFormat(bits=8, group=128, scale="bfloat16", float8=True),
}
ALL = FORMS | FLOAT8


def made(
    form: CodeFormat,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    invariant: bool = True,
) -> tuple[TritonCodes, Tensor]:
    """A product, and its matrix dequantized in float32."""
    codes, scales = random_matrix(form, n, k, n + k)
    if form.float8:
        codes[codes & 127 == 127] = 3  # no NaN
    product = TritonKernels(torch.device("cpu"), batch_invariant=invariant).codes(
        form, in_features=k, out_features=n, dtype=dtype, bias=bias
    )
    half = k // 16 * 8
    product.fill_codes(0, half, codes[:, half:])
    if half:
        product.fill_codes(0, 0, codes[:, :half])
    product.fill_scales(0, scales)
    if bias:
        product.fill_bias(0, randn(n, rng=generator(n), dtype=dtype))
    return product, dequantize(form, codes, scales)


def assert_is_the_sum(
    actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    """weight: as the kernel rounds it."""
    exact = x.double() @ weight.to(x.dtype).double().t()
    exact += 0.0 if bias is None else bias.double()
    size = x.double().abs() @ weight.double().abs().t()
    bound = ULP[actual.dtype] * exact.abs() + 2.0**-18 * size + 2.0**-24
    assert bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ALL),
        *(("q4_K", dtype) for dtype in DTYPES if dtype is not torch.bfloat16),
    ],
)
def test_products_and_rows(name: str, dtype: torch.dtype) -> None:
    form = ALL[name]
    for n, k in ((70, 200), (3, 5), (130, 576)):
        product, weight = made(form, n, k, dtype, bias=n == 70)
        x = randn(5, k, rng=generator(1), dtype=dtype)
        expected_x = x
        if form.activation_bits == 8:
            expected_x = round_to_int8(x.float()).to(dtype)
        assert_is_the_sum(product(x), expected_x, weight, product.bias)
        ids = torch.tensor([n - 1, 0, n // 2])
        torch.testing.assert_close(
            product.rows(ids), weight[ids].to(dtype), rtol=ULP[dtype], atol=1e-6
        )


@pytest.mark.parametrize("name", ["int4 g64", "fp8 g128"])
def test_a_row_has_its_bits_in_every_batch_and_in_every_place(name: str) -> None:
    product, _ = made(ALL[name], 70, 1100, torch.bfloat16)
    assert module._split(70, 1100, module.HALF)[1] > 1, "k is not split"
    x = randn(130, 1100, rng=generator(2), dtype=torch.bfloat16)
    whole = product(x)
    for rows in (1, 2, 63, 65):
        for first in (0, 130 - rows):
            part = product(x[first : first + rows].clone())
            assert torch.equal(bits(part), bits(whole[first : first + rows]))


def test_many_rows_are_multiplied_with_the_dequantized_matrix() -> None:
    product, weight = made(ALL["q4_K"], 70, 300, torch.float32, bias=True, invariant=False)
    x = randn(module.MANY_ROWS + 1, 300, rng=generator(3))
    assert_is_the_sum(product(x), x, weight, product.bias)
    assert_is_the_sum(product(x[:9]), x[:9], weight, product.bias)


def test_no_rows() -> None:
    product, _ = made(ALL["int4 g64"], 7, 64, torch.float16)
    assert product(torch.empty(0, 64, dtype=torch.float16)).shape == (0, 7)
    assert product.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("name", ["int4 g128 zeros", "int8 rows"])
def test_reordered_columns(name: str) -> None:
    form = replace(ALL[name], reordered=True)
    n, k = 70, 204
    codes, scales = random_matrix(form, n, k, 7)
    order = torch.randperm(k, generator=generator(8))
    weight = dequantize(form, codes[:, order], scales, order)
    for invariant in (True, False):
        product = TritonKernels(torch.device("cpu"), batch_invariant=invariant).codes(
            form, in_features=k, out_features=n, dtype=torch.float32, bias=False
        )
        product.fill_codes(0, 0, codes)
        product.fill_scales(0, scales)
        product.reorder(order)
        for rows in (9, module.MANY_ROWS + 1):
            x = randn(rows, k, rng=generator(9))
            assert_is_the_sum(product(x), x, weight)
        torch.testing.assert_close(product.rows(torch.tensor([5])), weight[[5]])


def test_every_float8_is_its_value() -> None:
    product, _ = made(FLOAT8["fp8 rows"], 256, 8, torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 8)
    product.fill_codes(0, 0, codes)
    product._scales.scale.fill_(1.0)
    values = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(
        product.rows(torch.arange(256)), values, rtol=0, atol=0, equal_nan=True
    )


def test_a_stack_of_two_formats() -> None:
    made_ones = [
        made(ALL[name], n, 40, torch.float32) for name, n in (("q4_1", 5), ("fp8 rows", 7))
    ]
    x = randn(3, 40, rng=generator(0))
    stack = TritonKernels(torch.device("cpu")).stack([product for product, _ in made_ones])
    assert_is_the_sum(stack(x), x, torch.cat([weight for _, weight in made_ones]))

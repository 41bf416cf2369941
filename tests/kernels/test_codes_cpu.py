"""Products over matrices of codes: what they compute, and that a row's bits depend on nothing else."""

from __future__ import annotations

from ctypes import byref
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.codes import (
    CodesProduct,
    PanelCodes,
    PanelStack,
    ReferenceCodes,
)
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.linear import PanelProduct
from quire.kernels.cpu.tiles import Tiles
from quire.kernels.dequantize import Scales, SideBySide, dequantize, empty_scales
from quire.kernels.select import create_kernels
from tests.kernels.cases import DTYPES, ULP, bits, dtypes, generator, randn, seeds
from tests.kernels.test_linear_cpu import assert_invariant

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
FORMS = {
    "int4 g64": CodeFormat(bits=4, group=64, scale="bfloat16", zero=8),
    "int4 g128 zeros": CodeFormat(bits=4, group=128, scale="float16", offset="zero"),
    "q4_1": CodeFormat(bits=4, group=32, scale="float16", offset="minimum"),
    "q4_K": CodeFormat(bits=4, group=32, scale="int8", super_groups=8, offset="minimum"),
    "q6_K": CodeFormat(bits=8, group=16, scale="int8", super_groups=16, zero=32),
    "iq4_nl": CodeFormat(bits=4, group=32, scale="float16", values=IQ4_NL),
    "nvfp4": CodeFormat(bits=4, group=16, values=E2M1_TWICE),
    "int8 rows": CodeFormat(bits=8, zero=128),
    "int8 g384": CodeFormat(bits=8, group=384, scale="bfloat16", zero=128),
    "w8a8": CodeFormat(bits=8, zero=128, activation_bits=8),
    "w4a8 g32": CodeFormat(bits=4, group=32, zero=8, activation_bits=8),
}
PRODUCTS = (PanelCodes, ReferenceCodes)


def random_matrix(form: CodeFormat, n: int, k: int, seed: int) -> tuple[Tensor, Scales]:
    rng = generator(seed)

    def integers(like: Tensor, most: int) -> Tensor:
        return torch.randint(most, like.shape, generator=rng).to(like.dtype)

    def floats(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=rng) * 0.02 + 0.001).to(like.dtype)

    codes = torch.randint(1 << form.bits, (n, k), generator=rng).to(torch.uint8)
    each = empty_scales(form, n, k)
    scale = integers(each.scale, 64) if form.super_groups else floats(each.scale)
    offset = each.offset
    if offset is not None:
        offset = integers(offset, 16) if offset.dtype is torch.uint8 else floats(offset)
    return codes, Scales(scale, offset, *(s if s is None else floats(s) for s in each[2:]))


def filled(
    kind: type[CodesProduct],
    form: CodeFormat,
    codes: Tensor,
    scales: Scales,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> CodesProduct:
    n, k = codes.shape
    try:
        product = kind(form, in_features=k, out_features=n, dtype=dtype, bias=bias is not None)
    except BuildError:
        pytest.skip("no native kernels here")
    half = k // 16 * 8  # codes and scales come in parts, in any order
    product.fill_codes(0, half, codes[:, half:])
    if half:
        product.fill_codes(0, 0, codes[:, :half].t().contiguous().t())
    cut = n // 2
    for rows in (slice(cut, n), slice(0, cut)):
        part = Scales(*(s if s is None else s[rows] for s in scales))
        product.fill_scales(rows.start, part)
    if bias is not None:
        product.fill_bias(0, bias)
    return product


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=6)
@given(k=st.integers(1, 600), n=st.integers(1, 200), dtype=dtypes, bias=st.booleans(), seed=seeds)
def test_products_and_rows(
    kind: type[CodesProduct], name: str, k: int, n: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    form = FORMS[name]
    codes, scales = random_matrix(form, n, k, seed)
    x = randn(19, k, rng=generator(seed), dtype=dtype)
    b = randn(n, rng=generator(seed + 1), dtype=dtype) if bias else None
    product = filled(kind, form, codes, scales, dtype, b)
    weight = dequantize(form, codes, scales)
    ids = torch.tensor([0, n - 1, n // 2])
    assert torch.equal(product.rows(ids), weight[ids].to(dtype))
    actual = product(x)
    exact = x.double() @ weight.double().t() + (0.0 if b is None else b.double())
    # Rounding x to integers moves each product by at most half a unit of its largest element.
    most = 127 if form.activation_bits == 8 else 32512
    units = x.double().abs().amax(dim=1, keepdim=True) / most
    bound = 0.51 * units * weight.double().abs().sum(dim=1) + 2 * ULP[dtype] * exact.abs() + 1e-5
    assert bool(((actual.double() - exact).abs() <= bound).all())
    assert_invariant(product, x, [1, 2, 3, 4, 7, 9, 16])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (70, 200), (192, 1024)])
def test_the_planned_bytes_are_those_held(name: str, n: int, k: int) -> None:
    form = replace(FORMS[name], reordered=True)
    product = PanelCodes(form, in_features=k, out_features=n, dtype=torch.float32, bias=False)
    product.reorder(torch.arange(k))
    held = [product._codes, *product._scales, product._order]
    assert form.num_bytes(n, k) == sum(each.nbytes for each in held if each is not None)


@pytest.mark.parametrize("name", FORMS)
def test_rows_threads_and_instructions_do_not_change_bits(name: str) -> None:
    form = FORMS[name]
    codes, scales = random_matrix(form, 320, 1096, 3)
    x = randn(230, 1096, rng=generator(4), dtype=torch.bfloat16)
    product = filled(PanelCodes, form, codes, scales, torch.bfloat16)
    assert isinstance(product, PanelCodes)
    whole = product(x)
    assert_invariant(product, x, [1, 8, 40, 229])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(product(x), whole)
    finally:
        torch.set_num_threads(threads)
    for march, flag in (("x86-64-v3", "avx2"), ("x86-64-v4", "avx512vl")):
        if flag not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
            continue  # another kind of processor
        lib = load_library(march)
        out = torch.empty_like(whole)
        lib.quire_linear(
            byref(product.c_weight), x.data_ptr(), 1096, out.data_ptr(), 320, 230, 0, 2
        )
        assert torch.equal(bits(out), bits(whole)), march


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_row(dtype: torch.dtype) -> None:
    form = FORMS["int4 g64"]
    codes, scales = random_matrix(form, 70, 200, 5)
    product = filled(PanelCodes, form, codes, scales, dtype)
    x = randn(5, 200, rng=generator(6), dtype=dtype)
    clean = product(x)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[2, 130] = value
        assert bool(product(x)[2].isnan().all())
        assert torch.equal(product(x)[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert torch.equal(product(torch.zeros_like(x)), torch.zeros_like(clean))


def test_reordered_columns() -> None:
    form = replace(FORMS["int4 g128 zeros"], reordered=True)
    codes, scales = random_matrix(form, 96, 256, 7)
    order = torch.randperm(256, generator=generator(8))
    weight = dequantize(form, codes[:, order], scales, order)
    x = randn(9, 256, rng=generator(9))
    for kind in PRODUCTS:
        product = filled(kind, form, codes, scales, torch.float32)
        product.reorder(order)
        torch.testing.assert_close(product(x), x @ weight.t(), rtol=1e-4, atol=2e-4)
        assert torch.equal(product.rows(torch.tensor([5])), weight[[5]])


def test_a_stack_gives_each_products_bits_side_by_side() -> None:
    rng, k = generator(10), 264
    x = randn(33, k, rng=rng, dtype=torch.bfloat16)
    dense = PanelProduct(in_features=k, out_features=40, dtype=torch.bfloat16, bias=False)
    dense.fill(0, randn(40, k, rng=rng, dtype=torch.bfloat16))
    products = [
        filled(PanelCodes, FORMS[name], *random_matrix(FORMS[name], n, k, n), torch.bfloat16)
        for name, n in (("int4 g64", 192), ("q6_K", 64), ("int8 rows", 100), ("w8a8", 64))
    ]
    expected = torch.cat([p(x) for p in (dense, *products)], dim=1)
    assert torch.equal(SideBySide([dense, *products])(x), expected)
    stack = PanelStack([dense, *products])
    assert torch.equal(stack(x), expected)
    assert torch.equal(stack(x[:1]), expected[:1])
    assert stack(x[:0]).shape == (0, expected.shape[1])


def test_by_tiles_a_chunk_of_a_stack_begins_at_a_whole_tile() -> None:
    """Also if the first matrix is computed otherwise: rows behind the last one are read, and must exist."""
    k = 4104
    x = randn(202, k, rng=generator(13))
    dense = PanelProduct(in_features=k, out_features=64, dtype=torch.float32, bias=False)
    codes = filled(
        PanelCodes, FORMS["q4_K"], *random_matrix(FORMS["q4_K"], 64, k, 14), torch.float32
    )
    assert isinstance(codes, PanelCodes)
    expected = torch.cat((dense(x), codes(x)), dim=1)
    codes.c_weight.tiles = Tiles.PLAIN
    assert torch.equal(PanelStack([dense, codes])(x), expected)


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_inputs_of_8_bits_are_an_option_of_the_kernels(
    kind: Literal["native", "reference"],
) -> None:
    form = FORMS["int4 g64"]
    codes, scales = random_matrix(form, 70, 128, 11)
    x = randn(4, 128, rng=generator(12))
    product = create_kernels(kind, activation_bits=8).codes(
        form, in_features=128, out_features=70, dtype=torch.float32, bias=False
    )
    product.fill_codes(0, 0, codes)
    product.fill_scales(0, scales)
    rounded = PanelCodes if kind == "native" else ReferenceCodes
    expected = filled(rounded, replace(form, activation_bits=8), codes, scales, torch.float32)
    assert torch.equal(product(x), expected(x))
    assert not torch.equal(product(x), filled(rounded, form, codes, scales, torch.float32)(x))


def test_codes_outside_the_matrix_are_refused() -> None:
    product = PanelCodes(
        FORMS["int4 g64"], in_features=64, out_features=64, dtype=torch.float32, bias=False
    )
    for row, column, shape in ((1, 0, (64, 64)), (0, 8, (8, 64)), (0, 4, (8, 8)), (-1, 0, (8, 8))):
        with pytest.raises(KernelArgumentError):
            product.fill_codes(row, column, torch.zeros(shape, dtype=torch.uint8))

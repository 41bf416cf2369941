"""Products over matrices of float8: what they compute, and that a row's bits do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.codes import PanelCodes, PanelStack, ReferenceCodes
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.linear import PanelProduct
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.dequantize import Scales, dequantize
from tests.kernels.cases import DTYPES, ULP, bits, dtypes, generator, randn, seeds
from tests.kernels.test_codes_cpu import filled
from tests.kernels.test_linear_cpu import assert_invariant

pytestmark = pytest.mark.usefixtures("native")
ROWS = [1, 2, 3, 5, 6, 7, 16, 17, 32, 33, 48, 100]
groups = st.sampled_from([0, 8, 32, 72, 128, 256])


def float8(group: int, scale: str = "float32") -> CodeFormat:
    return CodeFormat(bits=8, group=group, scale=scale, float8=True)  # type: ignore[arg-type]


def random_matrix(form: CodeFormat, n: int, k: int, seed: int) -> tuple[Tensor, Scales]:
    """Every code but the two of NaN, subnormals often."""
    rng = generator(seed)
    codes = torch.randint(255, (n, k), generator=rng)
    codes[torch.rand(n, k, generator=rng) < 0.3] &= 135
    codes[codes == 127] = 126
    scale = torch.rand(n, form.num_groups(k), generator=rng) * 0.01 + 0.001
    return codes.to(torch.uint8), Scales(scale.to(getattr(torch, form.scale)))


def assert_is_the_sum(
    actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().t()
    subnormal = 2.0**-25 if actual.dtype is torch.float16 else 0.0  # half of one
    bound = ULP[actual.dtype] * exact.abs() + 2.0**-20 * size + subnormal
    assert bool(((actual.double() - exact).abs() <= bound).all())


@settings(max_examples=40)
@given(
    k=st.integers(1, 400),
    n=st.integers(1, 200),
    group=groups,
    dtype=dtypes,
    scale=st.sampled_from(["float32", "bfloat16", "float16"]),
    bias=st.booleans(),
    seed=seeds,
)
def test_products_and_rows(
    k: int, n: int, group: int, dtype: torch.dtype, scale: str, bias: bool, seed: int
) -> None:
    form = float8(group, scale)
    codes, scales = random_matrix(form, n, k, seed)
    x = randn(37, k, rng=generator(seed), dtype=dtype)
    b = randn(n, rng=generator(seed + 1), dtype=dtype) if bias else None
    product = filled(PanelCodes, form, codes, scales, dtype, b)
    weight = dequantize(form, codes, scales)
    ids = torch.tensor([0, n - 1, n // 2])
    assert torch.equal(product.rows(ids), weight[ids].to(dtype))
    assert_is_the_sum(product(x), x, weight, b)
    assert_invariant(product, x, [1, 2, 3, 7, 16, 19])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 32, 72, 128])
def test_neither_rows_nor_threads_change_bits(
    group: int, dtype: torch.dtype, with_threads: Callable[[int, Callable[[], Tensor]], Tensor]
) -> None:
    form = float8(group)
    codes, scales = random_matrix(form, 130, 1096, 3)
    x = randn(200, 1096, rng=generator(4), dtype=dtype)
    product = filled(PanelCodes, form, codes, scales, dtype)
    one, two = (with_threads(threads, lambda: product(x)) for threads in (1, 2))
    assert torch.equal(bits(one), bits(two))
    assert_is_the_sum(one, x, dequantize(form, codes, scales))
    assert_invariant(product, x, ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_its_value(dtype: torch.dtype) -> None:
    """NaN too: it makes its row of the matrix NaN, and no other one."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 3)
    scales = Scales(torch.ones(256, 1))
    product = filled(PanelCodes, float8(0), codes, scales, dtype)
    values = codes.view(torch.float8_e4m3fn).to(dtype)
    rows = product.rows(torch.arange(256))
    assert torch.equal(bits(rows.nan_to_num(9e4)), bits(values.nan_to_num(9e4)))
    for rows_of_x in (1, 40):
        x = torch.zeros(rows_of_x, 3, dtype=dtype)
        x[:, 1] = 1
        actual = product(x)
        assert actual[0].isnan().nonzero().flatten().tolist() == [127, 255]
        assert torch.equal(
            actual.nan_to_num(9e4), values[:, 1].nan_to_num(9e4).expand(rows_of_x, -1)
        )


@pytest.mark.parametrize(
    ("march", "flag"), [("x86-64-v4", "avx512vl"), ("x86-64-v3", "avx2"), ("x86-64", "sse2")]
)
def test_other_instructions_give_the_same(
    native: NativeKernels, march: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flag not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"this processor has no {flag}")
    library = load_library(march)
    monkeypatch.setattr("quire.kernels.cpu.library.load_library", lambda: library)
    monkeypatch.setenv("QUIRE_CPU_TILES", "off")
    test_every_code_is_its_value(torch.float32)
    for dtype in DTYPES:
        for n, k, group in ((130, 77, 32), (64, 256, 0)):
            form = float8(group)
            codes, scales = random_matrix(form, n, k, k)
            x = randn(23, k, rng=generator(2), dtype=dtype)
            product = filled(PanelCodes, form, codes, scales, dtype)
            assert_is_the_sum(product(x), x, dequantize(form, codes, scales))
            assert_invariant(product, x, [1, 2, 3, 5, 8, 16])


def test_a_group_that_begins_inside_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles multiply whole runs of 32 columns; then vectors do, for every number of rows."""
    monkeypatch.setenv("QUIRE_CPU_TILES", "plain")
    for group in (0, 8, 32, 72, 96):
        form = float8(group)
        codes, scales = random_matrix(form, 70, 200, group)
        x = randn(40, 200, rng=generator(1), dtype=torch.bfloat16)
        product = filled(PanelCodes, form, codes, scales, torch.bfloat16)
        assert_is_the_sum(product(x), x, dequantize(form, codes, scales))
        assert_invariant(product, x, [1, 3, 16, 17, 33])


@pytest.mark.parametrize("tiles", ["auto", "plain"])
@pytest.mark.parametrize("group", [32, 72])
def test_a_stack_with_a_matrix_of_floats(
    tiles: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_CPU_TILES", tiles)
    rng, k = generator(10), 200
    x = randn(300, k, rng=rng, dtype=torch.bfloat16)
    dense = PanelProduct(in_features=k, out_features=40, dtype=torch.bfloat16, bias=False)
    dense.fill(0, randn(40, k, rng=rng, dtype=torch.bfloat16))
    form = float8(group)
    coded = filled(PanelCodes, form, *random_matrix(form, 100, k, 1), torch.bfloat16)
    assert isinstance(coded, PanelCodes)
    for products in ([dense, coded], [coded, dense]):
        expected = torch.cat([p(x) for p in products], dim=1)
        stack = PanelStack(products)
        for rows in (300, 33, 1):
            assert torch.equal(bits(stack(x[:rows])), bits(expected[:rows]))
        for product in products:
            product.c_weight.next = None


def test_the_reference_agrees() -> None:
    form = float8(128)
    codes, scales = random_matrix(form, 70, 300, 1)
    x = randn(5, 300, rng=generator(2))
    one, other = (
        filled(kind, form, codes, scales, x.dtype) for kind in (PanelCodes, ReferenceCodes)
    )
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-4)

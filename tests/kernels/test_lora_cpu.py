"""What adapters add to products of every kind, and that nothing but a row's own adapter changes its bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.codes import PanelCodes, ReferenceCodes, stack
from quire.kernels.cpu.linear import ExactSumProduct, PanelProduct
from quire.kernels.cpu.lora import HostAdapters
from quire.kernels.dequantize import SideBySide
from quire.kernels.lora import MatrixDelta
from quire.kernels.ops import LinearProduct
from tests.kernels.cases import ULP, bits, dtypes, generator, randn, seeds
from tests.kernels.test_codes_cpu import filled, random_matrix

INT4 = CodeFormat(bits=4, group=64, scale="bfloat16", zero=8)
INT8 = CodeFormat(bits=8, zero=128)
W8A8 = CodeFormat(bits=8, zero=128, activation_bits=8)
FLOAT8 = CodeFormat(bits=8, float8=True)
KINDS = ["dense", "plain", "int4", "int8", "w8a8", "float8", "reference", "stack", "side by side"]


def product(
    kind: str, sizes: Sequence[int], k: int, dtype: torch.dtype, seed: int
) -> LinearProduct:
    """Its parts one below the other; filled, with a bias."""
    rng = generator(seed)

    def dense(n: int, cls: type[PanelProduct | ExactSumProduct] = PanelProduct) -> LinearProduct:
        try:
            made = cls(in_features=k, out_features=n, dtype=dtype, bias=True)
        except BuildError:
            pytest.skip("no native kernels here")
        made.fill(0, randn(n, k, rng=rng, dtype=dtype))
        made.fill_bias(0, randn(n, rng=rng, dtype=dtype))
        return made

    def codes(n: int, form: CodeFormat, cls: type = PanelCodes) -> LinearProduct:
        numbers, scales = random_matrix(form, n, k, seed + n)
        if form.float8:
            numbers = numbers.clamp(max=0x70)
        return filled(cls, form, numbers, scales, dtype, randn(n, rng=rng, dtype=dtype))

    total = sum(sizes)
    if kind == "dense":
        return dense(total)
    if kind == "plain":
        return dense(total, ExactSumProduct)
    if kind == "reference":
        return SideBySide([codes(n, INT4, ReferenceCodes) for n in sizes])
    if kind == "side by side":
        return SideBySide(
            [dense(n) if i else codes(n, INT8, ReferenceCodes) for i, n in enumerate(sizes)]
        )
    forms = {"int4": INT4, "int8": INT8, "w8a8": W8A8, "float8": FLOAT8}
    if kind in forms:
        return stack([codes(n, forms[kind]) for n in sizes])
    return stack(
        [codes(n, (INT4, FLOAT8, INT8)[i]) if i % 2 == 0 else dense(n) for i, n in enumerate(sizes)]
    )


def deltas(
    sizes: Sequence[int], k: int, dtype: torch.dtype, seed: int, scaled: bool
) -> list[MatrixDelta]:
    """Of some of the parts, at least one."""
    rng = generator(seed)
    found, first = [], 0
    for index, n in enumerate(sizes):
        if index == seed % len(sizes) or int(torch.randint(2, (), generator=rng)):
            r = int(torch.randint(1, 40, (), generator=rng))
            a = randn(r, k, rng=rng).div_(math.sqrt(k)).to(dtype)
            gains = 0.5 + torch.rand(n, generator=rng) if scaled else None
            found.append(MatrixDelta(first, a, randn(n, r, rng=rng, dtype=dtype), 0.7, gains))
        first += n
    return found


def expected(base: Tensor, bias: Tensor, x: Tensor, adapter: Sequence[MatrixDelta]) -> Tensor:
    """From base, which is x @ W.T + bias, in float64."""
    out = base.double()
    for each in adapter:
        columns = slice(each.first, each.first + len(each.b))
        delta = each.scale * (x.double() @ each.a.double().T @ each.b.double().T)
        gains = 1.0 if each.gains is None else each.gains.double()
        out[:, columns] = (out[:, columns] - bias[columns] + delta) * gains + bias[columns]
    return out


def bias_of(made: LinearProduct) -> Tensor:
    parts = getattr(made, "products", (made,))
    return torch.cat([part.bias for part in parts]).double()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(
    k=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    rows=st.integers(1, 40),
    scaled=st.booleans(),
    seed=seeds,
)
def test_the_delta_is_added_before_the_result_is_rounded(
    kind: str, k: int, sizes: list[int], rows: int, scaled: bool, seed: int
) -> None:
    dtype = torch.float32
    made = product(kind, sizes, k, dtype, seed)
    adapters = HostAdapters([made, made], dtype=dtype, capacity=3, max_rank=64, parts=())
    given = [deltas(sizes, k, dtype, seed + i, scaled) for i in range(2)]
    for index, each in enumerate(given):
        adapters.put(index, adapters.pack({0: each}))
    adapters.put(2, adapters.pack({}))
    x = randn(rows, k, rng=generator(seed))
    chosen = torch.randint(-1, 3, (rows,), generator=generator(seed + 5), dtype=torch.int32)
    actual = adapters.rows(chosen).linear(0, made, x)
    base, bias = made(x), bias_of(made)
    for row, index in enumerate(chosen.tolist()):
        if index in (-1, 2):
            assert torch.equal(bits(actual[row]), bits(base[row]))
            continue
        wanted = expected(base[row : row + 1], bias, x[row : row + 1], given[index])[0]
        bound = 1e-5 * (1 + wanted.abs() + base[row].double().abs())
        assert bool(((actual[row].double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(
    k=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    rows=st.integers(1, 250),
    dtype=dtypes,
    scaled=st.booleans(),
    seed=seeds,
)
def test_a_row_has_the_bits_that_it_has_alone(
    kind: str, k: int, sizes: list[int], rows: int, dtype: torch.dtype, scaled: bool, seed: int
) -> None:
    made = product(kind, sizes, k, dtype, seed)
    adapters = HostAdapters([made, made], dtype=dtype, capacity=4, max_rank=64, parts=())
    for index in range(4):
        adapters.put(index, adapters.pack({0: deltas(sizes, k, dtype, seed + index, scaled)}))
    x = randn(rows, k, rng=generator(seed), dtype=dtype)
    chosen = torch.randint(-1, 4, (rows,), generator=generator(seed + 5), dtype=torch.int32)
    together = adapters.rows(chosen).linear(0, made, x)
    again = adapters.rows(chosen.flip(0)).linear(0, made, x.flip(0)).flip(0)
    assert torch.equal(bits(together), bits(again))
    for row in range(0, rows, max(1, rows // 5)):
        alone = adapters.rows(chosen[row : row + 1]).linear(0, made, x[row : row + 1])
        assert torch.equal(bits(alone[0]), bits(together[row]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    sizes, k = (130, 70), 257
    made = product("dense", sizes, k, dtype, 3)
    adapters = HostAdapters([made, made], dtype=dtype, capacity=1, max_rank=64, parts=())
    adapter = deltas(sizes, k, dtype, 1, False)
    adapters.put(0, adapters.pack({0: adapter}))
    x = randn(33, k, rng=generator(1), dtype=dtype)
    actual = adapters.rows(torch.zeros(33, dtype=torch.int32)).linear(0, made, x)
    weight = made.rows(torch.arange(200)).double()
    exact = expected(x.double() @ weight.T + made.bias.double(), made.bias.double(), x, adapter)
    near = (actual.double() - exact).abs() <= ULP[dtype] * 0.51 * exact.abs() + 1e-4
    assert bool(near.all())


def test_an_adapter_that_is_not_there() -> None:
    made = product("dense", [64], 16, torch.float32, 0)
    adapters = HostAdapters([made, made], dtype=torch.float32, capacity=2, max_rank=64, parts=())
    adapters.put(1, adapters.pack({}))
    adapters.clear(1)
    for index in (1, 2, 100):
        with pytest.raises(KernelArgumentError, match="not in the table"):
            adapters.rows(torch.tensor([-1, index], dtype=torch.int32))
    with pytest.raises(KernelArgumentError, match="cannot have adapters"):
        HostAdapters([torch.nn.Identity()], dtype=torch.float32, capacity=1, max_rank=1, parts=())  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding(dtype: torch.dtype) -> None:
    vocab, hidden, rank = 50, 100, 21
    made = product("dense", [vocab], hidden, dtype, 0)
    adapters = HostAdapters([made], dtype=dtype, capacity=2, max_rank=64, parts=())
    a, b = (
        randn(rank, vocab, rng=generator(1), dtype=dtype),
        randn(hidden, rank, rng=generator(2), dtype=dtype),
    )
    adapters.put(1, adapters.pack({1: [MatrixDelta(0, a, b, 0.3)]}))
    adapters.put(0, adapters.pack({}))
    ids = torch.tensor([3, 49, 0, 3, 7])
    base = made.rows(ids)
    chosen = torch.tensor([1, 1, 0, -1, 1], dtype=torch.int32)
    actual = adapters.rows(chosen).embed(base.clone(), ids)
    wanted = base.double() + 0.3 * a.double()[:, ids].T @ b.double().T
    changed = chosen == 1
    assert torch.equal(actual[~changed], base[~changed])
    torch.testing.assert_close(
        actual[changed], wanted[changed].to(dtype), rtol=ULP[dtype], atol=1e-5
    )

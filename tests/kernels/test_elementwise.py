from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.base import Activation, Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import DTYPES, assert_close, bits, dtypes, generator, randn, seeds

widths = st.one_of(st.integers(1, 300), st.sampled_from([512, 768, 1024, 2048, 3072]))
rows = st.integers(0, 9)
factors = st.sampled_from([1.0, 0.22, -3.0, 12.0, 1e-3])
ACTIVATIONS = get_args(Activation)
activations = st.sampled_from(ACTIVATIONS)


@given(rows=rows, width=widths, dtype=dtypes, in_float=st.booleans(), seed=seeds)
def test_rms_norm(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    width: int,
    dtype: torch.dtype,
    in_float: bool,
    seed: int,
) -> None:
    rng = generator(seed)
    x = randn(rows, width, rng=rng, dtype=dtype) * 3
    weight = randn(width, rng=rng, dtype=torch.float32 if in_float else dtype)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_moves_the_rounding(
    native: NativeKernels, reference: Kernels, dtype: torch.dtype
) -> None:
    """Against the two modules of transformers, written out: Llama's and Gemma's."""
    x, weight = randn(8, 500, rng=generator(0), dtype=dtype), randn(500, rng=generator(1)).to(dtype)
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    after, before = weight * normed.to(dtype), (weight.double() * normed).to(dtype)
    assert (after != before).float().mean() > 0.2
    for kernels in (native, reference):
        same = kernels.rms_norm(x, weight, 1e-6) == after
        assert same.float().mean() > 0.999
        same = kernels.rms_norm(x, weight.float(), 1e-6) == before
        assert same.float().mean() > 0.999


@given(rows=rows, width=widths, dtype=dtypes, in_float=st.booleans(), seed=seeds)
def test_add_rms_norm(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    width: int,
    dtype: torch.dtype,
    in_float: bool,
    seed: int,
) -> None:
    rng = generator(seed)
    x = randn(rows, width, rng=rng, dtype=dtype)
    residual = randn(rows, width, rng=rng, dtype=dtype) * 5
    weight = randn(width, rng=rng, dtype=torch.float32 if in_float else dtype)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_float", [False, True])
def test_norm_into_a_fused_projection(
    native: NativeKernels, reference: Kernels, dtype: torch.dtype, in_float: bool
) -> None:
    """OLMo 2's norm of all query heads together, in place; and into another tensor with a stride."""
    fused = randn(5, 8 * 24, rng=generator(0), dtype=dtype)
    weight = randn(96, rng=generator(1), dtype=torch.float32 if in_float else dtype)
    for kernels in (native, reference):
        qkv, wide = fused.clone(), torch.full_like(fused, 7.0)
        normed = kernels.rms_norm(fused[:, 24:120].contiguous(), weight, 1e-6)
        q, into = qkv[:, 24:120], wide[:, 8:104].view(5, 4, 24)
        assert kernels.rms_norm(q, weight, 1e-6, out=q) is q
        assert torch.equal(bits(q), bits(normed))
        assert torch.equal(qkv[:, :24], fused[:, :24]) and torch.equal(qkv[:, 120:], fused[:, 120:])
        heads = fused[:, 24:120].view(5, 4, 24)
        kernels.rms_norm(heads, weight[:24].clone(), 1e-6, out=into)
        assert torch.equal(bits(into), bits(kernels.rms_norm(heads, weight[:24].clone(), 1e-6)))
        assert bool((wide[:, :8] == 7).all()) and bool((wide[:, 104:] == 7).all())


@given(rows=rows, width=widths, dtype=dtypes, activation=activations, seed=seeds)
def test_gated(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    width: int,
    dtype: torch.dtype,
    activation: Activation,
    seed: int,
) -> None:
    gate_up = randn(rows, 2 * width, rng=generator(seed)).mul(8).to(dtype)
    actual, plain = native.gated(gate_up, activation), reference.gated(gate_up, activation)
    assert_close(actual, plain, ulps=4)
    assert_rows_alone(lambda part: native.gated(part, activation), gate_up, actual)
    assert_rows_alone(lambda part: reference.gated(part, activation), gate_up, plain)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_references_gate_does_not_depend_on_where_a_vector_ends(
    reference: Kernels, activation: Activation
) -> None:
    """PyTorch's differs in the last place between the elements that fill a vector and those left over."""
    gate_up = randn(200, 2 * 37, rng=generator(0)) * 4
    whole = reference.gated(gate_up, activation)
    assert_rows_alone(lambda part: reference.gated(part, activation), gate_up, whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_at_the_ends(native: NativeKernels, activation: Activation) -> None:
    gate = torch.tensor([[0.0, -200.0, 200.0, -torch.inf, torch.inf, torch.nan, -1e-30, 88.0]])
    actual = native.gated(torch.cat((gate, torch.ones_like(gate)), dim=-1), activation)
    expected = torch.tensor([[0.0, 0.0, 200.0, torch.nan, torch.inf, torch.nan, -5e-31, 88.0]])
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-40)


def test_gelu_tanh_against_float64(native: NativeKernels) -> None:
    """A relative error of 2**-24 in the exponent z is one of z * 2**-24 in the result."""
    gate = torch.cat((torch.linspace(-8, 8, 20001), randn(2000, rng=generator(0)) * 1e-3))[None]
    actual = native.gated(torch.cat((gate, torch.ones_like(gate)), dim=1), "gelu_tanh").double()
    z = (8 / torch.pi) ** 0.5 * (gate.double() + 0.044715 * gate.double() ** 3)
    expected = gate.double() * torch.sigmoid(z)
    error = (actual - expected).abs() / expected.abs().clamp(min=1e-300)
    assert bool((error <= (4 + z.clamp(max=0).abs()) * 2.0**-23).all()), error.max()


# --- add, scale and the end of logits: the expressions of transformers' models, bit for bit ---


@given(rows=rows, width=widths, dtype=dtypes, scale=factors, seed=seeds)
def test_add(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    rng = generator(seed)
    x, residual = randn(rows, width, rng=rng, dtype=dtype), randn(rows, width, rng=rng, dtype=dtype)
    expected = residual + x * scale  # Granite's residual_multiplier
    for kernels in (native, reference):
        total = changed(residual, partial(kernels.add, x, scale=scale))
        assert torch.equal(bits(total), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_unscaled_is_the_add_of_the_norm(
    native: NativeKernels, reference: Kernels, dtype: torch.dtype
) -> None:
    x, weight = randn(3, 77, rng=generator(0), dtype=dtype), torch.ones(77, dtype=dtype)
    for kernels in (native, reference):
        alone, normed = (randn(3, 77, rng=generator(1), dtype=dtype) for _ in range(2))
        kernels.add(x, alone)
        kernels.add_rms_norm(x, normed, weight, 1e-6)
        assert torch.equal(bits(alone), bits(normed))


@given(rows=rows, width=widths, spare=st.integers(0, 9), dtype=dtypes, factor=factors, seed=seeds)
def test_scale(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    width: int,
    spare: int,
    dtype: torch.dtype,
    factor: float,
    seed: int,
) -> None:
    rng = generator(seed)
    fused = randn(rows, width + spare, rng=rng, dtype=dtype)
    positions, table = torch.randint(0, 20, (rows,), generator=rng), randn(20, rng=rng).to(dtype)
    scaled, tempered = fused.clone(), fused.clone()
    scaled[:, :width] = fused[:, :width] * factor
    tempered[:, :width] = fused[:, :width] * table[positions][:, None]  # Ministral 3's queries
    for kernels in (native, reference):
        x, q = fused.clone(), fused.clone()
        kernels.scale(x[:, :width], factor)
        kernels.scale_by_position(q[:, :width], positions, table.float())
        assert torch.equal(bits(x), bits(scaled)) and torch.equal(bits(q), bits(tempered))


@pytest.mark.parametrize("number", [-(2**63), -1, 20, 2**40])
def test_wild_positions_are_refused_before_anything_is_written(
    native: NativeKernels, reference: Kernels, number: int
) -> None:
    positions = torch.tensor([0, 19, number])
    for kernels in (native, reference):
        x = torch.ones(3, 8)
        with pytest.raises(KernelArgumentError, match="position"):
            kernels.scale_by_position(x, positions, torch.zeros(20))
        assert torch.equal(x, torch.ones(3, 8))


@given(
    rows=st.integers(0, 3),
    vocab=st.one_of(st.integers(1, 300), st.sampled_from([8191, 8192, 20001])),
    dtype=dtypes,
    divisor=st.sampled_from([1.0, 8.0, 3.3]),
    cap=st.sampled_from([0.0, 30.0, 1.7]),
    seed=seeds,
)
def test_finish_logits(
    native: NativeKernels,
    reference: Kernels,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    divisor: float,
    cap: float,
    seed: int,
) -> None:
    """Granite's and Gemma 2's last lines, which are in the model's dtype."""
    logits = randn(rows, vocab, rng=generator(seed)).mul(20).to(dtype)
    expected = logits / divisor
    if cap:
        expected = torch.tanh(expected / cap) * cap
    for kernels in (native, reference):
        finish = partial(kernels.finish_logits, dtype=dtype, divisor=divisor, cap=cap)
        actual = changed(logits.float(), finish)
        assert torch.equal(actual, actual.to(dtype).float())
        # Where two tanh in float32 differ in the last place, so may what they round to.
        assert_close(actual.to(dtype), expected, ulps=4)
        if not cap:
            assert torch.equal(bits(actual.to(dtype)), bits(expected))
        assert_rows_alone(partial(changed, operation=finish), logits.float(), actual)


def test_tanh_against_float64(native: NativeKernels) -> None:
    x = torch.cat((torch.linspace(-10, 10, 20001), torch.linspace(-0.3, 0.3, 20001)))[None]
    tanh = partial(native.finish_logits, dtype=torch.float32, cap=1.0)
    error = changed(x, tanh).double() / torch.tanh(x.double()) - 1
    assert bool((error.nan_to_num().abs() < 4 * 2.0**-23).all()), error.abs().max()
    ends = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-42]])
    actual = changed(ends, tanh)
    torch.testing.assert_close(actual, torch.tanh(ends), equal_nan=True, rtol=0, atol=0)


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
            kernels.gated(torch.ones(2, 7), "silu")
        with pytest.raises(KernelArgumentError, match="relu"):
            kernels.gated(torch.ones(2, 8), "relu")
        for out in (torch.ones(4, 7), torch.ones(4, 8).half(), torch.ones(8, 4).t()):
            with pytest.raises(KernelArgumentError):
                kernels.rms_norm(x, weight, 1e-5, out=out)
        with pytest.raises(KernelArgumentError):
            kernels.rms_norm(x.half(), weight.bfloat16(), 1e-5)


def test_wrong_arguments_are_refused_before_anything_is_written(
    native: NativeKernels, reference: Kernels
) -> None:
    x, where, table = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    calls: list[tuple[str, tuple[object, ...], dict[str, float]]] = [
        ("add", (torch.ones(3, 8), x), {}),
        ("add", (x.half(), x), {}),
        ("add", (torch.ones(8, 4).t(), x), {}),
        ("scale", (x.t(), 2.0), {}),
        ("scale", (x[0], 2.0), {}),
        ("scale", (x.long(), 2.0), {}),
        ("scale_by_position", (x, where.int(), table), {}),
        ("scale_by_position", (x, where[:3], table), {}),
        ("scale_by_position", (x, where, table.half()), {}),
        ("scale_by_position", (x, where, table[None]), {}),
        ("finish_logits", (x.half(), torch.float16), {}),
        ("finish_logits", (x[:, :7], torch.float16), {"divisor": 2.0}),
        ("finish_logits", (x, torch.int64), {}),
        ("finish_logits", (x, torch.float16), {"divisor": 0.0}),
        ("finish_logits", (x, torch.float16), {"cap": -1.0}),
    ]
    for kernels in (native, reference):
        for name, arguments, options in calls:
            with pytest.raises(KernelArgumentError):
                getattr(kernels, name)(*arguments, **options)
    assert torch.equal(x, torch.ones(4, 8))


def changed(x: torch.Tensor, operation: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """What an operation in place makes of a copy."""
    copy = x.clone()
    operation(copy)
    return copy


def assert_rows_alone(operation, x: torch.Tensor, whole: torch.Tensor) -> None:
    for i in range(len(x)):
        assert torch.equal(bits(operation(x[i : i + 1].clone())), bits(whole[i : i + 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(native: NativeKernels, dtype: torch.dtype, with_threads) -> None:
    x, weight = randn(64, 1000, rng=generator(0), dtype=dtype), torch.ones(1000, dtype=dtype)
    positions, table = torch.arange(64), randn(64, rng=generator(1))
    for operation in (
        lambda: native.rms_norm(x, weight, 1e-5),
        lambda: native.gated(x, "silu"),
        lambda: native.gated(x, "gelu_tanh"),
        lambda: changed(x, lambda to: native.add(x, to, scale=0.22)),
        lambda: changed(x, lambda to: native.scale_by_position(to, positions, table)),
        lambda: changed(x.float(), lambda to: native.finish_logits(to, dtype, cap=2.0)),
    ):
        results = [with_threads(threads, operation) for threads in (1, 2, 3)]
        assert all(torch.equal(bits(results[0]), bits(other)) for other in results[1:])

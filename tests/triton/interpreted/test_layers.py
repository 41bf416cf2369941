from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.base import Activation
from quire.kernels.checks import KernelArgumentError
from quire.kernels.reference import ReferenceKernels
from quire.kernels.triton import layers
from tests.kernels.cases import DTYPES, assert_close, bits, dtypes, generator, randn, seeds

EPS = 1e-5
FP8 = torch.float8_e4m3fn
reference = ReferenceKernels()
widths = st.one_of(st.integers(1, 300), st.sampled_from([512, 1000, 1536]))
few = settings(max_examples=30)
as_on_a_gpu = np.errstate(over="ignore", invalid="ignore")  # infinities and NaN without a warning


def assert_rows_alone(operation: Callable[[Tensor], Tensor], x: Tensor, whole: Tensor) -> None:
    for i in range(len(x)):
        assert torch.equal(bits(operation(x[i : i + 1].clone())), bits(whole[i : i + 1]))


# --- norms and the embedding ------------------------------------------------------------------------


@few
@given(rows=st.integers(0, 4), width=widths, dtype=dtypes, in_float=st.booleans(), seed=seeds)
def test_norms(rows: int, width: int, dtype: torch.dtype, in_float: bool, seed: int) -> None:
    rng = generator(seed)
    x, residual = (randn(rows, width, rng=rng, dtype=dtype) * 3 for _ in range(2))
    weight = randn(width, rng=rng, dtype=torch.float32 if in_float else dtype)
    actual = layers.rms_norm(x, weight, EPS)
    assert_close(actual, reference.rms_norm(x, weight, EPS), ulps=3)
    assert_rows_alone(lambda part: layers.rms_norm(part, weight, EPS), x, actual)
    mine, theirs = residual.clone(), residual.clone()
    actual = layers.add_rms_norm(x, mine, weight, EPS)
    assert_close(actual, reference.add_rms_norm(x, theirs, weight, EPS), ulps=3)
    assert torch.equal(bits(mine), bits(theirs))
    assert torch.equal(bits(actual), bits(layers.rms_norm(theirs, weight, EPS)))
    # The rows of a wider matrix, and results that replace the input.
    wide = torch.cat((x, x), dim=1)[:, :width]
    assert torch.equal(bits(layers.add_rms_norm(wide, residual.clone(), weight, EPS)), bits(actual))
    assert layers.add_rms_norm(x, residual, weight, EPS, out=x) is x
    assert torch.equal(bits(x), bits(actual))


def test_rms_norm_is_the_formula() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0]])
    expected = torch.tensor([[3.0, 8.0, 0.0]]) / (25 / 3 + 1e-6) ** 0.5
    assert_close(layers.rms_norm(x, torch.tensor([1.0, 2.0, 3.0]), 1e-6), expected, ulps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_where_hugging_face_does(dtype: torch.dtype) -> None:
    x, weight = randn(8, 500, rng=generator(0), dtype=dtype), randn(500, rng=generator(1)).to(dtype)
    results = []
    for kind in (weight, weight.float()):
        results.append(layers.rms_norm(x, kind, EPS))
        same = results[-1] == reference.rms_norm(x, kind, EPS)
        assert same.float().mean() > 0.99
    assert (results[0] != results[1]).float().mean() > 0.2  # one rounding more in the first


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_into_a_fused_projection(dtype: torch.dtype) -> None:
    """OLMo 2's norm of all query heads together, in place; and into another tensor with a stride."""
    fused, weight = randn(5, 8 * 24, rng=generator(0), dtype=dtype), randn(96, rng=generator(1))
    qkv, wide = fused.clone(), torch.full_like(fused, 7.0)
    q, heads = qkv[:, 24:120], fused[:, 24:120].view(5, 4, 24)
    assert layers.rms_norm(q, weight, EPS, out=q) is q
    assert torch.equal(bits(q), bits(layers.rms_norm(fused[:, 24:120], weight, EPS)))
    assert torch.equal(qkv[:, :24], fused[:, :24]) and torch.equal(qkv[:, 120:], fused[:, 120:])
    into = layers.rms_norm(heads, weight[:24], EPS, out=wide[:, 8:104].view(5, 4, 24))
    assert torch.equal(bits(into), bits(layers.rms_norm(heads, weight[:24], EPS)))
    assert bool((wide[:, :8] == 7).all()) and bool((wide[:, 104:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_in_a_fused_projection(dtype: torch.dtype) -> None:
    qkv, weight = randn(3, 8 * 24, rng=generator(0), dtype=dtype), randn(24, rng=generator(1))
    heads, weight = qkv[:, 48 : 48 + 4 * 24].view(3, 4, 24), weight.to(dtype)
    actual = layers.rms_norm(heads, weight, EPS)
    dense = layers.rms_norm(heads.reshape(12, 24), weight, EPS).view(3, 4, 24)
    assert torch.equal(bits(actual), bits(dense)) and actual.is_contiguous()
    assert_close(actual, reference.rms_norm(heads, weight, EPS), ulps=3)


@few
@given(
    rows=st.integers(0, 4),
    width=widths,
    dtype=dtypes,
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=seeds,
)
def test_embedding(
    rows: int, width: int, dtype: torch.dtype, id_dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    table = randn(11, width, rng=rng, dtype=dtype)
    ids = torch.randint(0, 11, (rows,), generator=rng).to(id_dtype)
    assert torch.equal(bits(layers.embedding(ids, table)), bits(table[ids.long()]))


# --- the gated activation ---------------------------------------------------------------------------


@few
@given(
    rows=st.integers(0, 4),
    width=st.one_of(widths, st.sampled_from([1023, 1024, 1025, 2100])),
    dtype=dtypes,
    seed=seeds,
)
@as_on_a_gpu
def test_gated_activations(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = randn(rows, 2 * width, rng=generator(seed)).mul(4).to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    # PyTorch's tanh form cancels: in float32 it is its error that would show.
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh").to(dtype) * up
    cases: list[tuple[Activation, Tensor]] = [
        ("silu", reference.gated(gate_up, "silu")),
        ("gelu_tanh", gelu),
    ]
    for activation, expected in cases:
        actual = layers.gated(gate_up, activation)
        assert_close(actual, expected, ulps=4)
        assert_rows_alone(partial(layers.gated, activation=activation), gate_up, actual)
        assert layers.gated(gate_up, activation, out=torch.empty_like(actual)).equal(actual)


@as_on_a_gpu
def test_gated_activations_at_the_ends() -> None:
    gate = torch.tensor([[0.0, -200.0, 200.0, torch.inf, torch.nan, -1e-30, 88.0]])
    expected = torch.tensor([[0.0, 0.0, 200.0, torch.inf, torch.nan, -5e-31, 88.0]])
    for activation in get_args(Activation):
        actual = layers.gated(torch.cat((gate, torch.ones_like(gate)), dim=1), activation)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-40)


# --- add, scale and the end of logits ---------------------------------------------------------------

factors = st.sampled_from([1.0, 0.22, -3.0, 12.0])


@few
@given(rows=st.integers(0, 3), width=widths, dtype=dtypes, factor=factors, seed=seeds)
def test_add_and_scale(rows: int, width: int, dtype: torch.dtype, factor: float, seed: int) -> None:
    """Bit for bit the reference's, and the columns beside them stay."""
    rng = generator(seed)
    x, residual = (randn(rows, width, rng=rng, dtype=dtype) for _ in range(2))
    fused = randn(rows, width + 8, rng=rng, dtype=dtype)
    positions, table = torch.randint(0, 20, (rows,), generator=rng), randn(20, rng=rng)
    results = []
    for kernels in (layers, reference):
        total, scaled, tempered = residual.clone(), fused.clone(), fused.clone()
        kernels.add(x, total, scale=factor)
        kernels.scale(scaled[:, :width], factor)
        kernels.scale_by_position(tempered[:, :width], positions, table)
        results.append((total, scaled, tempered))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(bits(mine), bits(theirs))


@few
@given(
    rows=st.integers(0, 3),
    vocab=widths,
    dtype=dtypes,
    divisor=st.sampled_from([1.0, 8.0, 3.3]),
    cap=st.sampled_from([0.0, 30.0, 1.7]),
    seed=seeds,
)
def test_finish_logits(
    rows: int, vocab: int, dtype: torch.dtype, divisor: float, cap: float, seed: int
) -> None:
    def finish(part: Tensor) -> Tensor:
        part = part.clone()
        layers.finish_logits(part, divisor=divisor, cap=cap)
        return part

    logits = randn(rows, vocab, rng=generator(seed)).mul(20).to(dtype)
    expected, actual = logits.to(torch.float32, copy=True), finish(logits)
    reference.finish_logits(expected, dtype, divisor=divisor, cap=cap)
    assert_close(actual, expected.to(dtype), ulps=4)
    if not cap:
        assert torch.equal(bits(actual), bits(expected.to(dtype)))
    assert_rows_alone(finish, logits, actual)


@as_on_a_gpu
def test_tanh_against_float64() -> None:
    x = torch.cat((torch.linspace(-10, 10, 2001), torch.linspace(-0.3, 0.3, 2001)))[None]
    actual = x.clone()
    layers.finish_logits(actual, cap=1.0)
    error = actual.double() / torch.tanh(x.double()) - 1
    assert bool((error.nan_to_num().abs() < 4 * 2.0**-23).all()), error.abs().max()
    ends = torch.tensor([[0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -200.0]])
    expected = torch.tanh(ends)
    layers.finish_logits(ends, cap=1.0)
    torch.testing.assert_close(ends, expected, equal_nan=True, rtol=0, atol=0)


# --- rotation, and the write to the cache -----------------------------------------------------------


def rotated(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """x: [T, heads, D]. The formula, in float32."""
    half = cos_sin.shape[1] // 2
    cos, sin = (part[:, None] for part in cos_sin[positions.long()].split([half, half], dim=1))
    a, b, rest = x.float().split([half, half, x.shape[2] - 2 * half], dim=2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=2)


@few
@given(
    tokens=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (7, 2), (2, 3), (2, 8), (1, 9)]),
    half=st.sampled_from([0, 1, 4, 20, 32]),
    unrotated=st.sampled_from([0, 0, 1, 16]),
    norms=st.sampled_from([(False, False), (True, True), (True, False)]),
    in_float=st.booleans(),
    block_size=st.sampled_from([16, 64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    cache=st.sampled_from(["same", "fp8"]),
    dtype=dtypes,
    seed=seeds,
)
def test_one_call_is_norm_then_rotation_then_slots(
    tokens: int,
    heads: tuple[int, int],
    half: int,
    unrotated: int,
    norms: tuple[bool, bool],
    in_float: bool,
    block_size: int,
    index_dtype: torch.dtype,
    cache: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    (group, kv_heads), head_dim = heads, 2 * half + unrotated or 8
    rng, q_heads = generator(seed), group * kv_heads
    width = (q_heads + 2 * kv_heads) * head_dim
    fused = randn(tokens, width + 8, rng=rng, dtype=dtype)[:, :-8]
    cos_sin = randn(50, 2 * half, rng=rng)
    positions = torch.randint(0, 50, (tokens,), generator=rng).to(index_dtype)
    slots = torch.randperm(4 * block_size, generator=rng)[:tokens].to(index_dtype)
    slots[1:2] = -1
    weight_dtype = torch.float32 if in_float else dtype
    q_norm, k_norm = (
        randn(head_dim, rng=rng, dtype=weight_dtype) if norm else None for norm in norms
    )
    cache_dtype = FP8 if cache == "fp8" else dtype
    shape = (4, kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.full(shape, 7.0).to(cache_dtype) for _ in range(2))
    scales = [torch.rand(kv_heads, generator=rng) * 0.02 + 0.001 for _ in range(2)]
    k_scale, v_scale = scales if cache == "fp8" else (None, None)

    def run(part: slice) -> Tensor:
        qkv = fused.clone(memory_format=torch.preserve_format)[part].clone(
            memory_format=torch.preserve_format
        )
        layers.rope_write_kv(
            qkv, positions[part].clone(), cos_sin, k_cache, v_cache, slots[part].clone(),
            q_norm=q_norm, k_norm=k_norm, eps=EPS, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return qkv

    qkv = run(slice(None))
    q, k, v = fused.unflatten(1, (-1, head_dim)).split([q_heads, kv_heads, kv_heads], dim=1)
    q = q if q_norm is None else reference.rms_norm(q, q_norm, EPS)
    k = k if k_norm is None else reference.rms_norm(k, k_norm, EPS)
    atol = 1e-6 if not any(norms) else 8 * torch.finfo(dtype).eps
    q_expected, k_expected = (rotated(x, positions, cos_sin) for x in (q, k))
    assert_close(qkv[:, : q_heads * head_dim], q_expected.to(dtype).flatten(1), ulps=2, atol=atol)
    rest = slice(q_heads * head_dim, None)
    assert torch.equal(bits(qkv[:, rest]), bits(fused[:, rest]))

    expected = [torch.full(shape, 7.0).to(cache_dtype) for _ in range(2)]
    for values, into, scale in zip((k_expected, v.float()), expected, scales, strict=True):
        stored = values / scale[:, None] if cache == "fp8" else values
        limit = torch.finfo(cache_dtype).max
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, block_size)
                into[block, :, offset] = stored[t].clamp(-limit, limit).to(cache_dtype)
    if cache == "same":
        assert_close(k_cache, expected[0], ulps=2, atol=atol)
    else:
        # An e4m3 value has three bits behind the point, and 2**-9 is the smallest.
        torch.testing.assert_close(k_cache.float(), expected[0].float(), rtol=0.13, atol=2**-8)
    assert torch.equal(v_cache.view(torch.uint8), expected[1].view(torch.uint8))
    # Token by token: the same bits, in the queries and in the caches.
    before = [x.view(torch.uint8).clone() for x in (k_cache, v_cache)]
    for t in range(tokens):
        assert torch.equal(bits(run(slice(t, t + 1))), bits(qkv[t : t + 1]))
    for x, was in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(x.view(torch.uint8), was)


@as_on_a_gpu
def test_the_fp8_cache_saturates_and_keeps_nan() -> None:
    qkv = torch.zeros(1, 3 * 16)
    qkv[0, 16:20] = torch.tensor([1e6, -1e6, torch.inf, torch.nan])
    qkv[0, 32:34] = torch.tensor([300.0, 1.0])
    caches = [torch.zeros(1, 1, 16, 16).to(FP8) for _ in range(2)]
    layers.rope_write_kv(
        qkv, torch.tensor([0]), torch.zeros(1, 0), *caches, torch.tensor([3]),
        k_scale=torch.tensor([2.0]), v_scale=torch.tensor([0.5]),
    )  # fmt: skip
    k, v = (cache.float()[0, 0, 3] for cache in caches)
    expected = torch.tensor([448.0, -448.0, 448.0, torch.nan])
    torch.testing.assert_close(k[:4], expected, equal_nan=True, rtol=0, atol=0)
    assert v[:2].tolist() == [448.0, 2.0]


# --- what is refused --------------------------------------------------------------------------------


def test_wrong_tensors_raise() -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    for bad_x, bad_weight in (
        (x.double(), weight.double()),
        (x, weight.half()),
        (x, torch.ones(7)),
        (x.t(), torch.ones(4)),
        (x, torch.ones(16)[::2]),
        (x.flatten()[1:25].view(3, 8), weight),
        (x[:1].expand(4, 8), weight),
        (x[0], weight),
        (torch.ones(1, 20000), torch.ones(20000)),
    ):
        with pytest.raises(KernelArgumentError):
            layers.rms_norm(bad_x, bad_weight, EPS)
    with pytest.raises(KernelArgumentError):
        layers.rms_norm(x, weight, EPS, out=torch.ones(4, 8, dtype=torch.half))
    with pytest.raises(KernelArgumentError):
        layers.add_rms_norm(x, torch.ones(3, 8), weight, EPS)
    with pytest.raises(KernelArgumentError):
        layers.gated(torch.ones(2, 7), "silu")
    with pytest.raises(KernelArgumentError, match="relu"):
        layers.gated(torch.ones(2, 8), "relu")
    with pytest.raises(KernelArgumentError):
        layers.embedding(torch.ones(2), x)
    where, table = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    for wrong in (
        lambda: layers.rms_norm(x, weight, EPS, out=torch.ones(8, 4).t()),
        lambda: layers.rms_norm(x.half(), weight.bfloat16(), EPS),
        lambda: layers.add(x, torch.ones(3, 8)),
        lambda: layers.add(torch.ones(8, 4).t(), x),
        lambda: layers.scale(x.t(), 2.0),
        lambda: layers.scale(x.long(), 2.0),
        lambda: layers.scale_by_position(x, where[:3], table),
        lambda: layers.scale_by_position(x, where, table.half()),
        lambda: layers.finish_logits(x[:, :7]),
        lambda: layers.finish_logits(x, divisor=0.0),
        lambda: layers.finish_logits(x, cap=-1.0),
    ):
        with pytest.raises(KernelArgumentError):
            wrong()


def test_wrong_rotations_raise() -> None:
    def call(**changes: Tensor | None) -> None:
        arguments: dict[str, Tensor | None] = {
            "qkv": torch.zeros(2, 4 * 8),
            "positions": torch.zeros(2, dtype=torch.int64),
            "cos_sin": torch.zeros(4, 8),
            "k_cache": torch.zeros(1, 1, 16, 8),
            "v_cache": torch.zeros(1, 1, 16, 8),
            "slot_mapping": torch.zeros(2, dtype=torch.int64),
        }
        layers.rope_write_kv(**{**arguments, **changes})

    call()
    fp8 = {name: torch.zeros(1, 1, 16, 8).to(FP8) for name in ("k_cache", "v_cache")}
    call(**fp8, k_scale=torch.ones(1), v_scale=torch.ones(1))
    changes: list[dict[str, Tensor | None]] = [
        {"qkv": torch.zeros(2, 4 * 8 + 1)},
        {"qkv": torch.zeros(2, 2 * 8)},
        {"positions": torch.zeros(3, dtype=torch.int64)},
        {"positions": torch.zeros(2)},
        {"cos_sin": torch.zeros(4, 7)},
        {"cos_sin": torch.zeros(4, 10)},
        {"k_cache": torch.zeros(1, 1, 16, 8).half()},
        {"v_cache": torch.zeros(1, 1, 32, 8)},
        {"q_norm": torch.ones(7)},
        {"k_scale": torch.ones(1), "v_scale": torch.ones(1)},
        dict(fp8),
        {**fp8, "k_scale": torch.ones(1)},
        {**fp8, "k_scale": torch.ones(2), "v_scale": torch.ones(1)},
    ]
    for change in changes:
        with pytest.raises(KernelArgumentError):
            call(**change)

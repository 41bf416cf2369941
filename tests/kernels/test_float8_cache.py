"""A KV cache in float8: what is stored, and that attention over it has the bits of attention over the same
numbers in the model's dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import (
    Sequences,
    assert_close,
    bits,
    dtypes,
    generator,
    make_sequences,
    randn,
    seeds,
    starts,
)
from tests.kernels.test_kv_cache import empty_caches

F8 = torch.float8_e4m3fn
NUMBERS = torch.arange(256, dtype=torch.uint8).view(F8).float()
FINITE = NUMBERS[NUMBERS.isfinite()].sort().values
EDGES = torch.cat(
    (
        NUMBERS,
        (FINITE[1:] + FINITE[:-1]) / 2,  # ties, which go to the even one
        torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan, 1e-30, 2.0**-11, 463.9, 464.1]),
    )
)


def stored(
    kernels: Kernels, k: Tensor, v: Tensor, slots: Tensor, scales: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    caches = empty_caches(4, k.shape[1], k.shape[2], 16, F8)
    qkv = torch.cat((torch.zeros_like(k), k, v), dim=1).flatten(1)
    positions = torch.zeros(len(k), dtype=torch.int64)
    kernels.rope_write_kv(qkv, positions, torch.empty(1, 0), *caches, slots, kv_scales=scales)
    return caches


@given(
    head_dim=st.sampled_from([2, 6, 16, 34, 64]),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    dtype=dtypes,
    seed=seeds,
)
def test_what_is_stored(
    native: NativeKernels,
    reference: Kernels,
    head_dim: int,
    heads: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    rng = generator(seed)
    k, v = (
        EDGES[torch.randint(len(EDGES), (tokens, heads, head_dim), generator=rng)].to(dtype)
        for _ in range(2)
    )
    slots = torch.randperm(64, generator=rng)[:tokens]
    slots[::7] = -1
    scales = (torch.ones(heads), torch.full((heads,), 0.25))
    ours, plain = (stored(kernels, k, v, slots, scales) for kernels in (native, reference))
    for mine, theirs in zip(ours, plain, strict=True):
        same = mine.view(torch.uint8) == theirs.view(torch.uint8)
        assert bool((same | (mine.float().isnan() & theirs.float().isnan())).all())
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kept = plain[0][slot // 16, :, :, slot % 16].flatten(1).float()
            expected = k[t].float().clamp(-448, 448).to(F8).float()
            torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)


def paged(kernels: Kernels, s: Sequences, q: list[Tensor], **options: object) -> Tensor:
    return kernels.paged_attention(
        torch.cat(q),
        s.k_cache,
        s.v_cache,
        s.block_table,
        starts([len(x) for x in q]),
        s.seq_lens,
        scale=0.2,
        **options,  # type: ignore[arg-type]
    )


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    query=st.integers(1, 60),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([2, 16, 32, 64, 66, 128]),
    block_size=st.sampled_from([16, 32, 128]),
    window=st.sampled_from([0, 0, 20]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention_has_the_bits_of_a_cache_in_the_models_dtype(
    native: NativeKernels,
    reference: Kernels,
    lengths: list[int],
    query: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    rng = generator(seed)
    if dtype is not torch.bfloat16:  # only its layout is that of float8
        pairs = lambda x: x.unflatten(2, (-1, 2)).transpose(3, 4)  # noqa: E731
    s = make_sequences(
        native,
        lengths,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        rng=rng,
    )
    k8, v8 = s.k_cache.to(F8), s.v_cache.to(F8)
    dense = replace(s, k_cache=k8.to(dtype), v_cache=v8.to(dtype))
    if dtype is not torch.bfloat16:
        blocks, heads = k8.shape[:2]
        k8 = pairs(k8[..., 0].view(torch.uint8)).contiguous().view(F8)
        v8 = pairs(v8[..., 0].view(torch.uint8)).contiguous().view(F8)
        assert k8.shape == (blocks, heads, head_dim // 2, block_size, 2)
    q = [randn(min(query, n), kv_heads * group, head_dim, rng=rng, dtype=dtype) for n in lengths]
    ones = torch.ones(kv_heads)
    eight = replace(s, k_cache=k8, v_cache=v8)
    plain = paged(native, dense, q, window=window)
    assert torch.equal(
        bits(paged(native, eight, q, window=window, kv_scales=(ones, ones))), bits(plain)
    )
    scaled = (torch.rand(kv_heads, generator=rng) + 0.5, torch.rand(kv_heads, generator=rng) + 0.5)
    mine, other = (paged(k, eight, q, window=window, kv_scales=scaled) for k in (native, reference))
    assert_close(mine, other, ulps=3, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


def test_scales_belong_to_float8_and_to_nothing_else(native: NativeKernels) -> None:
    k, slots = torch.zeros(2, 1, 16), torch.arange(2)
    ones = torch.ones(1)
    qkv = torch.cat((k, k, k), dim=1).flatten(1)
    for dtype, scales in ((F8, None), (torch.float32, (ones, ones)), (F8, (ones, torch.ones(2)))):
        caches = empty_caches(1, 1, 16, 16, dtype)
        with pytest.raises(KernelArgumentError):
            native.rope_write_kv(
                qkv,
                torch.zeros(2, dtype=torch.int64),
                torch.empty(1, 0),
                *caches,
                slots,
                kv_scales=scales,
            )

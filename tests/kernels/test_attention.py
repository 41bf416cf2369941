"""Attention against the reference, the reference against torch, and the bits against themselves."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.base import Activation, Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import (
    DTYPES,
    ULP,
    Sequences,
    assert_close,
    bits,
    dtypes,
    generator,
    make_sequences,
    randn,
    seeds,
    slots_of,
    starts,
    store,
)

SEGMENT = 512  # attention.c closes its running sums every so many keys


@dataclass(frozen=True, slots=True)
class Options:
    scale: float
    window: int = 0
    softcap: float = 0.0


def attend(
    kernels: Kernels, s: Sequences, queries: list[Tensor], options: Options, **overrides: Tensor
) -> Tensor:
    """queries: each request's last query tokens, [n, q_heads, D]."""
    return kernels.paged_attention(
        torch.cat(queries),
        s.k_cache,
        s.v_cache,
        overrides.get("block_table", s.block_table),
        starts([len(q) for q in queries]),
        overrides.get("seq_lens", s.seq_lens),
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
    )


def plain_attention(s: Sequences, b: int, q: Tensor, options: Options) -> Tensor:
    """Float64, from the unpaged keys and values."""
    keys, values = s.keys[b].double(), s.values[b].double()
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
    length, queries = keys.shape[1], q.shape[0]
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    i = torch.arange(length - queries, length)[:, None]
    j = torch.arange(length)
    visible = j <= i
    if options.window:
        visible &= j > i - options.window
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return (weights @ values).transpose(0, 1)


def assert_attention(actual: Tensor, s: Sequences, queries: list[Tensor], options: Options) -> None:
    """Equal to `plain_attention`, up to rounding.

    In bfloat16 weights may be rounded as well: to 2**-9 of each, so the sum by 2**-9 of the weighted
    magnitudes, and once more in the weights' own sum.
    """
    expected = torch.cat([plain_attention(s, b, q, options) for b, q in enumerate(queries)])
    ulps, atol = 2 * ULP[actual.dtype], torch.full_like(expected, 4e-6)
    if actual.dtype is torch.bfloat16:
        magnitudes = replace(s, values=[v.abs() for v in s.values])
        sums = [plain_attention(magnitudes, b, q, options) for b, q in enumerate(queries)]
        atol += 2.0**-8 * torch.cat(sums)
    error = (actual.double() - expected).abs()
    assert bool((error <= atol + ulps * expected.abs()).all()), error.max()


requests = st.lists(
    st.tuples(st.integers(1, 100), st.integers(0, 40)).map(lambda r: (r[0], min(r))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(
    requests=requests,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 40]),
    head_dim=st.sampled_from([1, 2, 3, 8, 12, 16, 33, 64, 80, 96, 128, 200]),
    block_size=st.sampled_from([16, 32, 48, 128]),
    window=st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40]),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 50.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_native_and_reference_are_attention(
    native: NativeKernels,
    reference: Kernels,
    requests: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(dtype is not torch.bfloat16 or head_dim % 2 == 0)
    rng = generator(seed)
    s = make_sequences(
        native,
        [length for length, _ in requests],
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        rng=rng,
    )
    queries = [randn(n, kv_heads * group, head_dim, rng=rng, dtype=dtype) for _, n in requests]
    options = Options(head_dim**-0.5, window, softcap)
    for kernels in (native, reference):
        assert_attention(attend(kernels, s, queries, options), s, queries, options)


def test_reference_is_torchs_own(reference: Kernels) -> None:
    rng = generator(0)
    s = make_sequences(
        reference, [50], kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, rng=rng
    )
    q = randn(50, 6, 64, rng=rng)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, s.keys[0], s.values[0])),
        is_causal=True,
        enable_gqa=True,
    )
    actual = attend(reference, s, [q], Options(64**-0.5))
    assert_close(actual, expected[0].transpose(0, 1).contiguous(), ulps=8)


# ---- invariance: the same bits ----


@settings(max_examples=40)
@given(
    length=st.integers(1, 120),
    cuts=st.lists(st.integers(1, 119), max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 2), (8, 1), (5, 1)]),
    head_dim=st.sampled_from([8, 12, 64, 80]),
    block_size=st.sampled_from([16, 64]),
    window=st.sampled_from([0, 0, 20]),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 30.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_chunks_are_the_whole(
    native: NativeKernels,
    length: int,
    cuts: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Each chunk attends when only its own keys and those before are in the cache, beside another
    request; the whole attends at once, alone."""
    rng, (group, kv_heads) = generator(seed), heads
    s = make_sequences(
        native,
        [length, 37],
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        rng=rng,
    )
    q = randn(length, group * kv_heads, head_dim, rng=rng, dtype=dtype)
    other = randn(5, group * kv_heads, head_dim, rng=rng, dtype=dtype)
    options = Options(head_dim**-0.5, window, softcap)
    whole = attend(
        native, s, [q], options, block_table=s.table_row(0), seq_lens=s.seq_lens[:1].clone()
    )
    s.k_cache[s.table_row(0)[0][s.table_row(0)[0] >= 0].long()] = torch.nan
    s.v_cache[s.table_row(0)[0][s.table_row(0)[0] >= 0].long()] = torch.nan
    bounds = sorted({0, length, *(cut for cut in cuts if cut < length)})
    for begin, end in itertools.pairwise(bounds):
        slots = slots_of(s.block_table[0], begin, end, block_size)
        k, v = s.keys[0][begin:end], s.values[0][begin:end]
        store(native, k, v, s.k_cache, s.v_cache, slots)
        lens = torch.tensor([end, 37]).int()
        part = attend(native, s, [q[begin:end], other], options, seq_lens=lens)
        assert torch.equal(bits(part[: end - begin]), bits(whole[begin:end]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_prefilling_across_segments(native: NativeKernels, dtype: torch.dtype) -> None:
    rng, length = generator(1), 2 * SEGMENT + 100
    s = make_sequences(
        native, [length], kv_heads=1, head_dim=16, block_size=16, dtype=dtype, rng=rng
    )
    q = randn(length, 2, 16, rng=rng, dtype=dtype)
    for options in (
        Options(0.25),
        Options(0.25, window=SEGMENT + 40),
        Options(0.25, window=SEGMENT + 40, softcap=1.5),
    ):
        whole = attend(native, s, [q], options)
        for end in (1, 2, 16, 17, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 17, length):
            lens = torch.tensor([end]).int()
            token = attend(native, s, [q[end - 1 : end]], options, seq_lens=lens)
            assert torch.equal(bits(token[0]), bits(whole[end - 1]))
        assert_attention(attend(native, s, [q[-40:]], options), s, [q[-40:]], options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(0.125), Options(0.125, window=40, softcap=2.0)])
def test_neither_batch_nor_threads_matter(
    native: NativeKernels,
    dtype: torch.dtype,
    options: Options,
    with_threads: Callable[[int, Callable[[], Tensor]], Tensor],
) -> None:
    rng, lengths, query_lens = generator(2), [70, 1, 33, 200], [1, 1, 33, 90]
    s = make_sequences(
        native, lengths, kv_heads=2, head_dim=64, block_size=16, dtype=dtype, rng=rng
    )
    queries = [randn(n, 6, 64, rng=rng, dtype=dtype) for n in query_lens]
    batch = with_threads(1, lambda: attend(native, s, queries, options))
    for threads in (2, 4):
        again = with_threads(threads, lambda: attend(native, s, queries, options))
        assert torch.equal(bits(again), bits(batch))
    for b, part in enumerate(batch.split(query_lens)):
        table, lens = s.table_row(b), s.seq_lens[b : b + 1].clone()
        alone = attend(native, s, [queries[b]], options, block_table=table, seq_lens=lens)
        assert torch.equal(bits(alone), bits(part))


@settings(max_examples=25)
@given(
    requests=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 40)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 2), (7, 1)]),
    window=st.sampled_from([0, 0, 100, SEGMENT, 1100]),
    softcap=st.sampled_from([0.0, 2.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_segments_shared_among_threads_change_nothing(
    native: NativeKernels,
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int,
    softcap: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """With few units of work and many threads, each unit's segments are worked on apart."""
    rng, (group, kv_heads) = generator(seed), heads
    lengths = [length for length, _ in requests]
    s = make_sequences(
        native, lengths, kv_heads=kv_heads, head_dim=64, block_size=16, dtype=dtype, rng=rng
    )
    queries = [
        randn(min(n, length), group * kv_heads, 64, rng=rng, dtype=dtype) for length, n in requests
    ]
    options = Options(0.125, window, softcap)
    alone = attend(native, s, queries, options)
    try:
        for threads in (2, 5, 16):
            torch.set_num_threads(threads)
            assert torch.equal(bits(attend(native, s, queries, options)), bits(alone))
    finally:
        torch.set_num_threads(1)


@settings(max_examples=25)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 600), st.sampled_from([1, 1, 1, 2, 30])), min_size=4, max_size=12
    ),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 4), (1, 8), (7, 2)]),
    head_dim=st.sampled_from([8, 64, 80]),
    block_size=st.sampled_from([16, 48]),
    window=st.sampled_from([0, 0, 100, 520]),
    dtype=dtypes,
    seed=seeds,
)
def test_reading_all_heads_of_a_request_together_changes_nothing(
    native: NativeKernels,
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """At one thread four requests are enough for that; at sixteen 64 would be."""
    rng, (group, kv_heads) = generator(seed), heads
    lengths = [length for length, _ in requests]
    s = make_sequences(
        native,
        lengths,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        rng=rng,
    )
    queries = [
        randn(min(n, length), group * kv_heads, head_dim, rng=rng, dtype=dtype)
        for length, n in requests
    ]
    options = Options(0.125, window)
    together = attend(native, s, queries, options)
    try:
        torch.set_num_threads(16)
        assert torch.equal(bits(attend(native, s, queries, options)), bits(together))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 0.0), (9, 1.5)])
def test_reference_chunks_are_the_whole(
    reference: Kernels, dtype: torch.dtype, kv_heads: int, window: int, softcap: float
) -> None:
    rng = generator(4)
    s = make_sequences(
        reference, [40], kv_heads=kv_heads, head_dim=18, block_size=16, dtype=dtype, rng=rng
    )
    q, options = randn(40, 4, 18, rng=rng, dtype=dtype), Options(0.25, window, softcap)
    whole = attend(reference, s, [q], options)
    for end in range(1, 41):
        lens = torch.tensor([end]).int()
        token = attend(reference, s, [q[end - 1 : end]], options, seq_lens=lens)
        assert torch.equal(bits(token[0]), bits(whole[end - 1]))


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_narrower_cpus(native: NativeKernels, reference: Kernels, march: str) -> None:
    """The code a CPU without AVX-512 gets. With fused multiply-add, it even gives the same bits."""
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64")
    narrow = NativeKernels(march=march)
    rng = generator(5)
    for dtype in DTYPES:
        s = make_sequences(
            narrow, [70, 20], kv_heads=2, head_dim=24, block_size=16, dtype=dtype, rng=rng
        )
        queries = [randn(n, 6, 24, rng=rng, dtype=dtype) for n in (1, 20)]
        options = Options(0.2, window=30, softcap=1.5)
        assert_attention(attend(narrow, s, queries, options), s, queries, options)
        actual = attend(narrow, s, queries, Options(0.2))
        assert_attention(actual, s, queries, Options(0.2))
        x = randn(3, 2 * 37, rng=rng).mul(5).to(dtype)
        weight = randn(74, rng=rng, dtype=dtype)
        for activation in get_args(Activation):
            gated = narrow.gated(x, activation)
            assert_close(gated, reference.gated(x, activation), ulps=4)
            if march == "x86-64-v3":
                assert torch.equal(bits(gated), bits(native.gated(x, activation)))
        assert_close(narrow.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), ulps=3)
        # AVX512_BF16 rounds between the products of a pair.
        if march == "x86-64-v3" and dtype is not torch.bfloat16:
            assert torch.equal(bits(actual), bits(attend(native, s, queries, Options(0.2))))
    assert torch.equal(narrow.philox_uniform(5, 6, 99), reference.philox_uniform(5, 6, 99))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
def test_every_half_precision_value_rounds_as_torch(march: str) -> None:
    """Loads and stores of all 65,536 patterns, and of the floats halfway between them."""
    if march != "native" and platform.machine() != "x86_64":
        pytest.skip("not an x86-64")
    kernels = NativeKernels(march=march)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype)
        values = values[values.isfinite()]
        zeros = torch.zeros_like(values)[None]
        residual = values[None].clone()
        kernels.add_rms_norm(zeros, residual, torch.ones_like(values), 1e-5)
        assert torch.equal(residual[0], values)
        ordered = values.float().sort().values
        ordered = ordered[ordered.abs() < ordered.max() / 2]
        a, b = ordered[:-1].to(dtype), ordered[1:].to(dtype)
        residual = a[None].clone()
        kernels.add_rms_norm(b[None], residual, torch.ones_like(a), 1e-5)
        assert torch.equal(bits(residual[0]), bits(a + b))


# ---- the edges ----


def test_strided_queries_and_indicesout(native: NativeKernels, reference: Kernels) -> None:
    rng = generator(6)
    s = make_sequences(
        native, [9, 5], kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32, rng=rng
    )
    qkv = randn(8, 8 * 16, rng=rng)
    q = qkv[:, : 4 * 16].view(8, 4, 16)
    for kernels in (native, reference):
        out = torch.full((8, 4, 16), 7.0)
        returned = kernels.paged_attention(
            q, s.k_cache, s.v_cache, s.block_table, starts([4, 2]), s.seq_lens, scale=0.25, out=out
        )
        assert returned is out and bool((out[6:] == 7.0).all())
        dense = attend(kernels, s, [q[:4].contiguous(), q[4:6].contiguous()], Options(0.25))
        assert torch.equal(out[:6], dense)


def test_blocks_before_the_window_are_not_read(native: NativeKernels, reference: Kernels) -> None:
    rng = generator(7)
    s = make_sequences(
        native, [100], kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32, rng=rng
    )
    q = randn(3, 2, 8, rng=rng)
    freed = s.block_table.clone()
    freed[0, :4] = -1  # queries at 97, 98, 99 with window 20 see keys from 78: block 4 on
    for kernels in (native, reference):
        options = Options(0.3, window=20)
        expected = attend(kernels, s, [q], options)
        assert torch.equal(attend(kernels, s, [q], options, block_table=freed), expected)
        with pytest.raises(KernelArgumentError, match="block"):
            attend(kernels, s, [q], Options(0.3, window=40), block_table=freed)


def test_large_scores_stay_finite_and_nan_shows(native: NativeKernels) -> None:
    rng = generator(8)
    s = make_sequences(
        native, [40], kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32, rng=rng
    )
    q = randn(40, 1, 8, rng=rng) * 1e4
    actual = attend(native, s, [q], Options(1.0))
    expected = plain_attention(s, 0, q, Options(1.0))
    torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.05)
    q[7] = torch.nan
    broken = attend(native, s, [q], Options(1.0))
    assert bool(broken[7].isnan().all())
    assert torch.equal(broken[:7], actual[:7]) and torch.equal(broken[8:], actual[8:])


def test_a_later_tokens_infinity_stays_its_own(native: NativeKernels) -> None:
    """A masked key is skipped, not multiplied by zero."""
    rng = generator(9)
    s = make_sequences(
        native, [30], kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32, rng=rng
    )
    q = randn(30, 3, 8, rng=rng)
    clean = attend(native, s, [q], Options(0.3))
    slot = int(slots_of(s.block_table[0], 20, 21, 16))
    s.v_cache[slot // 16, :, slot % 16] = torch.inf
    s.k_cache[slot // 16, :, :, slot % 16] = torch.nan
    dirty = attend(native, s, [q], Options(0.3))
    assert torch.equal(bits(dirty[:20]), bits(clean[:20])) and bool(dirty[20:].isnan().all())


WILD = [-(2**31), -1000, -1, 1000, 2**20, 2**31 - 1]


@given(
    field=st.sampled_from(["block_table", "query_start_loc", "seq_lens"]),
    where=st.integers(0, 5),
    number=st.sampled_from(WILD),
)
def test_wild_indices_are_refused_before_anything_is_read(
    native: NativeKernels, reference: Kernels, field: str, where: int, number: int
) -> None:
    """One entry of one index tensor is far out; `out` stays as it was."""
    s = make_sequences(
        native, [20, 40], kv_heads=2, head_dim=8, block_size=16, dtype=torch.bfloat16,
        rng=generator(11),
    )  # fmt: skip
    indices = {
        "block_table": s.block_table,
        "query_start_loc": torch.tensor([0, 2, 6]).int(),
        "seq_lens": s.seq_lens,
    }
    flat = indices[field].view(-1)
    where %= flat.numel()
    if field == "query_start_loc" and where == 0 and number > 0:
        number = -number
    refused = int(flat[where]) != -1  # else past the request's end: never read
    flat[where] = number
    q = torch.ones(6, 4, 8, dtype=torch.bfloat16)
    for kernels in (native, reference):
        out = torch.full_like(q, 7.0)
        call = partial(
            kernels.paged_attention, q, s.k_cache, s.v_cache, **indices, scale=1.0, out=out
        )
        if not refused:
            call()
            continue
        with pytest.raises(KernelArgumentError):
            call()
        if kernels is native:
            assert bool((out == 7.0).all())


def test_wrong_contents_and_tensors_raise(native: NativeKernels, reference: Kernels) -> None:
    rng = generator(10)
    s = make_sequences(
        native, [20, 40], kv_heads=2, head_dim=8, block_size=16, dtype=torch.float32, rng=rng
    )
    q = randn(6, 4, 8, rng=rng)
    good = {
        "q": q,
        "k_cache": s.k_cache,
        "v_cache": s.v_cache,
        "block_table": s.block_table,
        "query_start_loc": torch.tensor([0, 2, 6]).int(),
        "seq_lens": s.seq_lens,
    }
    past = s.block_table.clone()
    past[1, 1] = len(s.k_cache)
    bad: list[dict[str, Tensor]] = [
        {"query_start_loc": torch.tensor([0, 2, 7]).int()},
        {"query_start_loc": torch.tensor([0, 4, 2]).int()},
        {"query_start_loc": torch.tensor([-1, 2, 6]).int()},
        {"seq_lens": torch.tensor([1, 40]).int()},
        {"seq_lens": torch.tensor([20, 4000]).int()},
        {"block_table": past},
        {"q": q[:, :3]},
        {"q": q.half()},
        {"q": q[..., :7]},
        {"seq_lens": s.seq_lens.long()},
        {"seq_lens": s.seq_lens[:1]},
        {"block_table": s.block_table.long()},
        {"block_table": s.block_table[:1]},
        {"v_cache": s.v_cache.half()},
        {"k_cache": s.v_cache},
    ]
    for kernels in (native, reference):
        kernels.paged_attention(**good, scale=1.0)
        for change in bad:
            with pytest.raises(KernelArgumentError):
                kernels.paged_attention(**{**good, **change}, scale=1.0)

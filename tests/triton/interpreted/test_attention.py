"""Paged attention in the interpreter: against attention written out, and against itself bit for bit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.triton import attention
from quire.kernels.triton.tuning import Tile

SMALL = Tile(block_m=16, block_n=16, warps=4, stages=2, split=32, per_level=8)
"""Tiles so small that a few dozen keys cross every border there is; the shapes are no concern here."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "tile", lambda key: SMALL)


@dataclasses.dataclass(frozen=True)
class Model:
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    decode_query_len: int = 1
    invariant: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Everything one request will ever ask and see: q [n, q_heads, D], k and v [n, kv_heads, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __len__(self) -> int:
        return len(self.q)


def sequence(model: Model, length: int, seed: int = 0) -> Sequence:
    draw = torch.Generator().manual_seed(seed * 1000 + length)
    shapes = [(length, heads, model.head_dim) for heads in (model.q_heads, *[model.kv_heads] * 2)]
    q, k, v = (torch.randn(shape, generator=draw).to(model.dtype) for shape in shapes)
    if model.softcap:
        q *= 4  # scores that the cap bends
    if model.fp8:  # values that the cache holds exactly
        k, v = (x.to(torch.float8_e4m3fn).to(model.dtype) for x in (k, v))
    return Sequence(q, k, v)


def expected(model: Model, s: Sequence) -> Tensor:
    """Attention of every position of one sequence, in float64. [n, q_heads, D]"""
    group = model.q_heads // model.kv_heads
    k, v = (x.double().repeat_interleave(group, 1) for x in (s.k, s.v))
    if model.fp8:
        factor = scales(model).double().repeat_interleave(group)
        k, v = k * factor[:, None], v * 2 * factor[:, None]
    scores = torch.einsum("qhd,khd->hqk", s.q.double(), k) * model.scale
    if model.softcap:
        scores = model.softcap * torch.tanh(scores / model.softcap)
    i = torch.arange(len(s))
    seen = i[None] <= i[:, None]
    if model.window:
        seen &= i[None] > i[:, None] - model.window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def scales(model: Model) -> Tensor:
    return torch.linspace(0.5, 1.5, model.kv_heads)


def attend(
    model: Model,
    calls: list[tuple[Sequence, int, int]],
    *,
    ends: list[int] | None = None,
    spare_rows: int = 0,
    **options: object,
) -> list[Tensor]:
    """Outputs for tokens [start, end) of each sequence, all in one call.

    Blocks are scattered; whatever the call may not look at is NaN: slots past the end, blocks before
    the window, spare blocks. The queries are a view into a fused projection.
    """
    ends = ends or [end for _, _, end in calls]
    size = model.block_size
    max_blocks = max([-(-end // size) for end in ends], default=0) + 1
    cache_dtype = torch.float8_e4m3fn if model.fp8 else model.dtype
    shape = (len(calls) * max_blocks + 1, model.kv_heads, size, model.head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan).to(cache_dtype) for _ in range(2))
    order = torch.randperm(shape[0] - 1, generator=torch.Generator().manual_seed(7)) + 1
    table = torch.zeros(len(calls), max_blocks, dtype=torch.int32)
    for b, ((s, start, _), end) in enumerate(zip(calls, ends, strict=True)):
        oldest = max(0, start - model.window + 1) if model.window else 0
        for block in range(oldest // size, -(-end // size)):
            table[b, block] = where = order[b * max_blocks + block]
            span = slice(block * size, min((block + 1) * size, end))
            for cache, x in ((k_cache, s.k), (v_cache, s.v)):
                rows = x[span].to(cache_dtype).transpose(0, 1)
                cache[where, :, : rows.shape[1]] = rows
    counts = [end - start for _, start, end in calls]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    heads = model.q_heads + 2 * model.kv_heads
    fused = torch.full(
        (sum(counts) + spare_rows, heads, model.head_dim), torch.nan, dtype=model.dtype
    )
    fused[: sum(counts), : model.q_heads] = torch.cat([s.q[start:end] for s, start, end in calls])
    q = fused[:, : model.q_heads]
    out = torch.full(q.shape, torch.nan, dtype=model.dtype)
    arrived = torch.zeros(len(calls) * model.kv_heads, dtype=torch.int32)
    arguments: dict[str, object] = {
        "scale": model.scale,
        "max_query_len": max(counts),
        "decode_query_len": model.decode_query_len,
        "window": model.window,
        "softcap": model.softcap,
        "k_scale": scales(model) if model.fp8 else None,
        "v_scale": scales(model) * 2 if model.fp8 else None,
        "invariant": model.invariant,
        "workspace": torch.full(
            (
                attention.workspace_floats(
                    k_cache,
                    q_heads=model.q_heads,
                    max_requests=len(calls),
                    max_len=max_blocks * size,
                    window=model.window,
                    decode_query_len=model.decode_query_len,
                ),
            ),
            torch.nan,
        ),
        "arrived": arrived,
    }
    lengths = torch.tensor(ends, dtype=torch.int32)
    attention.paged_attention(
        q, k_cache, v_cache, table, starts, lengths, out=out, **(arguments | options)
    )
    assert out[sum(counts) :].isnan().all()
    assert not arrived.any()  # for the next layer
    return [out[int(a) : int(b)] for a, b in itertools.pairwise(starts)]


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(model: Model, calls: list[tuple[Sequence, int, int]]) -> None:
    for got, (s, start, end) in zip(attend(model, calls), calls, strict=True):
        tolerance = TOLERANCE[model.dtype]
        torch.testing.assert_close(
            got.double(), expected(model, s)[start:end], rtol=tolerance, atol=tolerance
        )


MIXED = [(100, 99), (20, 19), (1, 0), (47, 0), (33, 32), (90, 63), (16, 15), (17, 1), (64, 64)]
"""(length, computed before): decodes, prompts, chunks, borders of blocks and splits, an empty row."""
FEW = [(70, 69), (32, 31), (35, 14)]

MODELS = {
    "bf16": Model(dtype=torch.bfloat16),
    "fp16": Model(dtype=torch.float16),
    "group 1": Model(q_heads=2, kv_heads=2),
    "group 3": Model(q_heads=6, kv_heads=2),
    "group 7": Model(q_heads=7, kv_heads=1),
    "group 8": Model(q_heads=8, kv_heads=1),
    "group 20": Model(q_heads=20, kv_heads=1),
    "head_dim 80": Model(head_dim=80, kv_heads=1),
    "head_dim 96": Model(head_dim=96, kv_heads=1, dtype=torch.bfloat16),
    "head_dim 128, blocks of 64": Model(head_dim=128, block_size=64),
    "head_dim 256, blocks of 128": Model(q_heads=2, kv_heads=1, head_dim=256, block_size=128),
    "window 1": Model(kv_heads=1, window=1),
    "window 10": Model(kv_heads=1, window=10),
    "window 40, blocks of 32": Model(kv_heads=1, window=40, block_size=32),
    "softcap": Model(kv_heads=1, softcap=5.0),
    "fp8": Model(dtype=torch.bfloat16, fp8=True),
    "fp8, softcap, window": Model(dtype=torch.bfloat16, fp8=True, softcap=3.0, window=21),
    "softcap, window": Model(dtype=torch.bfloat16, softcap=3.0, window=21),
    "speculation": Model(kv_heads=1, decode_query_len=4),
    "invariant": Model(kv_heads=1, invariant=True),
    "invariant, window": Model(kv_heads=1, invariant=True, window=33),
    "invariant, softcap, window": Model(kv_heads=1, invariant=True, softcap=3.0, window=33),
}


def calls_for(model: Model, cuts: list[tuple[int, int]]) -> list[tuple[Sequence, int, int]]:
    return [(sequence(model, n, i), start, n) for i, (n, start) in enumerate(cuts)]


def test_lengths_against_attention_written_out() -> None:
    check(Model(), calls_for(Model(), MIXED))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_models_against_attention_written_out(model: Model) -> None:
    check(model, calls_for(model, FEW))


@pytest.mark.parametrize(
    "model",
    [Model(head_dim=80, block_size=32), Model(dtype=torch.bfloat16, fp8=True, window=21)],
    ids=["head_dim 80", "fp8, window"],
)
def test_copy_engine_gives_the_same_bits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_for(model, FEW)
    loaded = attend(model, calls)
    monkeypatch.setattr(attention, "tile", lambda key: dataclasses.replace(SMALL, tma=True))
    assert all(torch.equal(a, b) for a, b in zip(attend(model, calls), loaded, strict=True))


WINDOWED = st.sampled_from([0, 0, 5, 30])
CAPPED = st.sampled_from([0.0, 3.0])


@settings(max_examples=8)
@given(
    length=st.integers(2, 80),
    cuts=st.lists(st.integers(1, 79), max_size=3),
    window=WINDOWED,
    softcap=CAPPED,
    neighbour=st.integers(1, 50),
)
def test_a_prompt_has_the_same_bits_however_it_is_cut(
    length: int, cuts: list[int], window: int, softcap: float, neighbour: int
) -> None:
    """Pieces of at least two tokens: one alone is decoded, which is another order of sums."""
    model = Model(q_heads=3, kv_heads=1, head_dim=16, window=window, softcap=softcap)
    s, other = sequence(model, length), sequence(model, neighbour, 1)
    borders = [0]
    for cut in sorted(cuts):
        if borders[-1] + 2 <= cut <= length - 2:
            borders.append(cut)
    pieces = zip(borders, [*borders[1:], length], strict=True)
    (whole,) = attend(model, [(s, 0, length)])
    parts = [attend(model, [(other, 0, neighbour), (s, *piece)])[1] for piece in pieces]
    assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=8)
@given(length=st.integers(1, 120), others=st.lists(st.integers(1, 60), max_size=3), window=WINDOWED)
def test_a_decoded_token_has_the_same_bits_in_every_batch(
    length: int, others: list[int], window: int
) -> None:
    """Beside other decodes, beside a prompt, and as one of the tokens that verify a speculation."""
    model = Model(q_heads=3, kv_heads=1, head_dim=16, window=window, decode_query_len=3)
    s = sequence(model, length + 2)
    calls = [(sequence(model, n, i), n - 1, n) for i, n in enumerate(others)]
    prompt = (sequence(model, 9, 9), 0, 9)
    (alone,) = attend(model, [(s, length - 1, length)])
    among = attend(model, [*calls, prompt, (s, length - 1, length)])[-1]
    (verified,) = attend(model, [(s, length - 1, length + 2)])
    assert torch.equal(alone, among) and torch.equal(alone, verified[:1])


@settings(max_examples=6)
@given(length=st.integers(2, 120), window=WINDOWED, softcap=CAPPED)
def test_invariant_decodes_and_prompts_agree_bit_for_bit(
    length: int, window: int, softcap: float
) -> None:
    model = Model(
        q_heads=3, kv_heads=1, head_dim=16, window=window, softcap=softcap, invariant=True
    )
    s = sequence(model, length)
    (whole,) = attend(model, [(s, 0, length)])
    (last,) = attend(model, [(s, length - 1, length)])
    assert torch.equal(whole[-1:], last)


@pytest.mark.parametrize(
    "model",
    [
        Model(q_heads=6, kv_heads=2, dtype=torch.bfloat16, decode_query_len=3),
        Model(dtype=torch.bfloat16, fp8=True, window=70),
        Model(kv_heads=1, invariant=True),
    ],
    ids=["speculation", "fp8, window", "invariant"],
)
def test_the_last_split_merges_to_the_bits_of_a_kernel_for_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more splits than programs too, and beside requests with one split and none."""
    calls = calls_for(model, [(500, 499), (31, 30), (90, 89)])
    monkeypatch.setattr(attention, "MIN_SHARES", 3)
    monkeypatch.setattr(attention, "PROGRAMS", 1)
    launched: list[object] = []
    stock = attention.merge_kernel.run

    def merge(*args: object, **options: object) -> None:
        launched.append(options["grid"])
        stock(*args, **options)

    monkeypatch.setattr(attention.merge_kernel, "run", merge)
    fused = attend(model, calls)
    assert not launched
    apart = attend(model, calls, arrived=None)
    assert len(launched) == 1
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


def test_counters_too_few_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="arrived"):
        few = torch.zeros(1, dtype=torch.int32)
        attend(Model(), calls_for(Model(), [(70, 69), (9, 8)]), arrived=few)


def test_the_number_of_shares_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(kv_heads=1)
    calls = calls_for(model, [(200, 199), (90, 89)])
    many = attend(model, calls)
    monkeypatch.setattr(attention, "MIN_SHARES", 1)
    monkeypatch.setattr(attention, "PROGRAMS", 1)
    assert all(torch.equal(a, b) for a, b in zip(attend(model, calls), many, strict=True))


@pytest.mark.parametrize("rows", [1, 3], ids=["decode", "prompt"])
def test_a_padded_request_of_a_graph_is_zero(rows: int) -> None:
    """Its tokens are there, its length is 0, and its row of the table is all null."""
    model = Model(kv_heads=1)
    nothing = sequence(model, 0)
    padding = Sequence(torch.randn(rows, 4, 64), nothing.k, nothing.v)
    s = sequence(model, 40)
    real, padded = attend(model, [(s, 39, 40), (padding, 0, rows)], ends=[40, 0])
    assert torch.equal(real, attend(model, [(s, 39, 40)])[0])
    assert torch.equal(padded, torch.zeros_like(padded))


def test_rows_past_the_last_request_are_left_alone() -> None:
    model = Model(kv_heads=1)
    (out,) = attend(model, [(sequence(model, 20), 15, 20)], spare_rows=2)
    assert not out.isnan().any()


def test_splits_on_the_host_are_those_of_the_kernels() -> None:
    """`_slots` sizes the workspace; a slot too few would write past it."""
    for split in (32, 256):
        ends, level = [], 0
        while len(ends) < 40:
            ends += [split << level] * 8
            level += 1
        borders = torch.tensor(ends).cumsum(0).tolist()
        for index, end in enumerate(borders):
            tile = dataclasses.replace(SMALL, split=split)
            assert attention._slots(end, 0, 1, tile) == index + 1
            assert attention._slots(end + 1, 0, 1, tile) == index + 2


@settings(max_examples=200)
@given(
    max_len=st.integers(1, 500),
    window=st.integers(1, 200),
    queries=st.integers(1, 5),
    length=st.integers(1, 500),
)
def test_slots_suffice_under_a_window(max_len: int, window: int, queries: int, length: int) -> None:
    length = min(length, max_len)
    first = max(length - queries - window + 1, 0) // 32
    assert (length - 1) // 32 + 1 - first <= attention._slots(max_len, window, queries, SMALL)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"workspace": torch.empty(3)}, "workspace"),
        ({"k_scale": torch.ones(2)}, "k_scale"),
        ({"scale": 0.0}, "scale"),
        ({"window": -1}, "window"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, object], match: str) -> None:
    model = Model()
    with pytest.raises(KernelArgumentError, match=match):
        attend(model, [(sequence(model, 40), 39, 40)], **change)

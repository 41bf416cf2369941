from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.philox import gumbel_from_uniform, philox_words
from quire.kernels.reference import filtered_scores
from quire.kernels.sampling import SAMPLE_ROW, SampledTokens
from tests.kernels.cases import generator, randn, seeds

OFF = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": 0, "position": 0}
# Below, at and above a group, whole vectors and not, more groups than a vector has lanes.
vocabs = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 127, 400, 1111, 4096, 5001])


def sample_rows(count: int, **fields: Any) -> NDArray[np.void]:
    rows = np.zeros(count, dtype=SAMPLE_ROW)
    for name, value in {**OFF, **fields}.items():
        rows[name] = value
    return rows


def support(kernels: Kernels, logits: torch.Tensor, draws: int = 400, **fields: Any) -> set[int]:
    """The tokens of one row that are ever drawn."""
    rows = sample_rows(draws, **fields)
    rows["position"] = np.arange(draws)
    return set(kernels.sample(logits.repeat(draws, 1), rows).token_ids.tolist())


def same(left: SampledTokens, right: SampledTokens) -> bool:
    return bool((left.token_ids == right.token_ids).all() and (left.valid == right.valid).all())


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10, as far as our counter layout reaches them."""
    assert [hex(w) for w in philox_words(0, 0, 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**63),
    n=st.integers(0, 300),
)
def test_uniforms_are_the_same_bits(
    native: NativeKernels, reference: Kernels, seed: int, position: int, n: int
) -> None:
    u = native.philox_uniform(seed, position, n)
    assert torch.equal(u, reference.philox_uniform(seed, position, n))
    assert u.shape == (n,) and bool(((u > 0) & (u < 1)).all())


def test_uniforms_are_uniform_and_independent(native: NativeKernels) -> None:
    u = native.philox_uniform(7, 3, 200_000).double()
    assert abs(float(u.mean()) - 0.5) < 0.003 and abs(float(u.var()) - 1 / 12) < 0.001
    counts = torch.histc(u, 100, 0.0, 1.0)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 160  # chi-square, 99 degrees: p ~ 1e-4
    for other in (native.philox_uniform(7, 4, 200_000), native.philox_uniform(8, 3, 200_000)):
        assert abs(float(torch.corrcoef(torch.stack((u, other.double())))[0, 1])) < 0.01
    assert not torch.equal(native.philox_uniform(7, 3 + 2**32, 8), native.philox_uniform(7, 3, 8))


def random_logits(rows: int, vocab: int, spread: float, grain: float, seed: int) -> torch.Tensor:
    """Strided rows; with a grain, many ties; some excluded."""
    rng = generator(seed)
    logits = randn(rows, vocab + 3, rng=rng)[:, :vocab] * spread
    if grain:
        logits = (logits / grain).round() * grain
    logits[torch.rand(rows, vocab, generator=rng) < 0.1] = -torch.inf
    return logits


@given(
    vocab=vocabs,
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0, 1e4]),
    grain=st.sampled_from([0.0, 0.0, 0.5]),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 1e-6, 0.3, 0.77, 0.95, 0.9999, 1 - 2**-24, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.5, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 64, 65, 1000, 5000, 2**31 - 1]),
    seed=seeds,
)
def test_native_draws_from_what_the_reference_keeps(
    native: NativeKernels,
    vocab: int,
    spread: float,
    grain: float,
    temperature: float,
    top_p: float,
    min_p: float,
    top_k: int,
    seed: int,
) -> None:
    logits = random_logits(3, vocab, spread, grain, seed)
    rows = sample_rows(3, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    rows["seed"] = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, 3)
    rows["position"] = [0, 77, 2**40]
    result = native.sample(logits, rows)
    assert result.valid.all()
    for r, (token, row) in enumerate(zip(result.token_ids.tolist(), rows, strict=True)):
        assert token == native.sample(logits[r : r + 1], rows[r : r + 1]).token_ids[0]
        if temperature == 0.0 or logits[r].max() == -torch.inf:
            assert token == int(logits[r].argmax())
            continue
        u = native.philox_uniform(int(row["seed"]), int(row["position"]), vocab)
        noise = gumbel_from_uniform(u.double())
        # The same draw from a little less, and a little more, than top_p: sums differ in rounding.
        nearby = []
        for near_p in (top_p, top_p * (1 - 1e-6), min(top_p * (1 + 1e-6), 1.0)):
            near_row = row.copy()
            near_row["top_p"] = near_p
            noisy = filtered_scores(logits[r], near_row).double() + noise
            nearby.append(float(noisy[token]) >= float(noisy.max()) - 1e-5)
        assert any(nearby), (r, token)


@given(vocab=vocabs, seed=seeds, data=st.data())
def test_nan_anywhere_is_that_rows_alone(
    native: NativeKernels, reference: Kernels, vocab: int, seed: int, data: st.DataObject
) -> None:
    logits = randn(3, vocab, rng=generator(seed))
    logits[1, data.draw(st.integers(0, vocab - 1))] = math.nan
    if vocab > 1 and data.draw(st.booleans()):
        logits[1, data.draw(st.integers(0, vocab - 1))] = math.inf
        logits[1, data.draw(st.integers(0, vocab - 1))] = math.nan
    for rows in (None, sample_rows(3), sample_rows(3, top_k=5, top_p=0.9)):
        for kernels in (native, reference):
            result = kernels.sample(logits, rows)
            assert result.valid.tolist() == [True, False, True]
            assert result.token_ids[1] == 0
            alone = kernels.sample(logits[[0, 2]], rows if rows is None else rows[[0, 2]])
            assert result.token_ids[[0, 2]].tolist() == alone.token_ids.tolist()


def test_nan_at_every_position(native: NativeKernels) -> None:
    for vocab in (1, 16, 63, 64, 130, 200):
        logits = torch.zeros(vocab, vocab)
        logits.fill_diagonal_(math.nan)
        assert not native.sample(logits, None).valid.any()
        assert native.sample(torch.zeros(2, vocab), None).valid.all()


@given(vocab=vocabs, seed=seeds, grain=st.sampled_from([0.0, 1.0]))
def test_greedy_is_the_lowest_id_of_the_largest(
    native: NativeKernels, reference: Kernels, vocab: int, seed: int, grain: float
) -> None:
    logits = random_logits(4, vocab, 2.0, grain, seed)
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    for kernels in (native, reference):
        assert kernels.sample(logits, None).token_ids.tolist() == expected
        greedy = sample_rows(4, temperature=0.0, top_k=3, top_p=0.1)
        assert kernels.sample(logits, greedy).token_ids.tolist() == expected


def test_frequencies_are_the_softmax(native: NativeKernels) -> None:
    """Chi-square with 4 filtered shapes: drawn from a list, and from whole groups."""
    draws, rng = 60_000, generator(1)
    for vocab, fields in (
        (5, {}),
        (40, {"temperature": 0.7}),
        (300, {"top_k": 9, "top_p": 0.9}),
        (90, {"top_p": 0.97, "min_p": 0.02}),
    ):
        logits = randn(vocab, rng=rng)
        logits[2] = -torch.inf
        rows = sample_rows(draws, seed=11, **fields)
        rows["position"] = np.arange(draws)
        tokens = native.sample(logits.expand(draws, vocab).contiguous(), rows).token_ids
        counts = np.bincount(tokens, minlength=vocab)
        expected = draws * torch.softmax(filtered_scores(logits, rows[0]).double(), 0).numpy()
        kept = expected > 0
        assert counts[~kept].sum() == 0
        chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
        degrees = int(kept.sum()) - 1
        assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_native_and_reference_draw_the_same(native: NativeKernels, reference: Kernels) -> None:
    logits = randn(64, 3000, rng=generator(0)) * 2
    for fields in ({}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.5}, {"min_p": 0.1}):
        rows = sample_rows(64, seed=np.arange(64), position=np.arange(64) * 7, **fields)
        assert same(native.sample(logits, rows), reference.sample(logits, rows))


def test_a_row_is_the_same_whatever_the_batch_and_the_threads(
    native: NativeKernels, with_threads: Callable[[int, Callable[[], Any]], Any]
) -> None:
    logits = randn(48, 6000, rng=generator(4)) * 3
    rows = sample_rows(48, seed=np.arange(48) * 97, position=np.arange(48))
    rows["temperature"] = np.resize([0.0, 0.6, 1.0, 2.0], 48)
    rows["top_p"] = np.resize([1.0, 0.9, 0.5], 48)
    rows["top_k"] = np.resize([0, 40, 0, 3000, 1], 48)
    expected = with_threads(1, lambda: native.sample(logits, rows))
    for threads in (2, 3):
        for _ in range(20):
            assert same(with_threads(threads, lambda: native.sample(logits, rows)), expected)
    shuffled = np.random.default_rng(0).permutation(48)
    again = native.sample(logits[torch.from_numpy(shuffled)], rows[shuffled])
    assert again.token_ids.tolist() == expected.token_ids[shuffled].tolist()
    for r in range(48):
        alone = native.sample(logits[r : r + 1].clone(), rows[r : r + 1])
        assert alone.token_ids[0] == expected.token_ids[r]


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_narrower_cpus(native: NativeKernels, march: str) -> None:
    """The code a CPU without AVX-512 gets keeps the same tokens, and draws the same but for near ties."""
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64")
    narrow = NativeKernels(march=march)
    for vocab in (1, 65, 700, 5001):
        logits = random_logits(64, vocab, 3.0, 0.0, vocab)
        rows = sample_rows(64, seed=np.arange(64), position=9)
        rows["top_p"] = np.resize([1.0, 0.9, 0.5], 64)
        rows["top_k"] = np.resize([0, 40, 0, 3000, 1], 64)
        rows["min_p"] = np.resize([0.0, 0.0, 0.0, 0.05], 64)
        assert same(narrow.sample(logits, rows), native.sample(logits, rows))
        logits[3, vocab // 2] = math.nan
        assert same(narrow.sample(logits, None), native.sample(logits, None))


def test_where_the_cut_falls_among_ties_lower_ids_stay(
    native: NativeKernels, reference: Kernels
) -> None:
    flat = torch.zeros(1, 100)
    ladder = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.0]])
    for kernels in (native, reference):
        assert support(kernels, flat, top_k=3) == {0, 1, 2}
        assert support(kernels, flat, draws=2000, top_k=70) == set(range(70))
        assert support(kernels, flat, draws=2000, top_k=100) == set(range(100))
        assert support(kernels, ladder, top_k=1) == {0}
        assert support(kernels, ladder, top_k=3) == {0, 1, 2}
        assert support(kernels, ladder, top_k=4) == {0, 1, 2, 3}
        assert support(kernels, flat, draws=800, top_p=0.125) == set(range(13))
        assert support(kernels, flat, draws=800, top_p=0.25) == set(range(25))
        assert support(kernels, ladder, top_k=4, top_p=0.85) == {0, 1, 2}
        assert support(kernels, ladder, top_k=4, top_p=0.95) == {0, 1, 2, 3}
        assert support(kernels, flat, top_p=0.0) == {0}
        assert support(kernels, ladder, min_p=1.0) == {0}


@pytest.mark.parametrize("vocab", [5000, 151_936])
def test_flat_distributions_over_large_vocabularies(native: NativeKernels, vocab: int) -> None:
    """The cut falls among equals, or among many that are nearly so."""
    flat = torch.zeros(1, vocab)
    kept = math.ceil(float(np.float32(0.3)) * vocab)
    tokens = sorted(support(native, flat, draws=300, top_p=0.3))
    assert tokens[-1] < kept and tokens[-1] > 0.97 * kept
    tokens = sorted(support(native, flat, draws=300, top_k=vocab // 2))
    assert tokens[-1] < vocab // 2 and tokens[-1] > 0.97 * (vocab // 2)
    assert support(native, flat, draws=300, top_k=1) == {0}
    slope = torch.arange(vocab, dtype=torch.float32).unsqueeze(0) * -1e-7
    tokens = sorted(support(native, slope, draws=300, top_p=0.3))
    assert tokens[-1] < 0.302 * vocab and tokens[-1] > 0.29 * vocab
    tokens = sorted(support(native, slope.flip(1), draws=300, top_k=vocab // 2))
    assert tokens[0] >= vocab - vocab // 2 - 1


@given(logit=st.sampled_from([0.0, -0.0, 1e30, -1e30, 3e38, -3e38, math.inf, -math.inf, 1e-45]))
def test_one_token(native: NativeKernels, reference: Kernels, logit: float) -> None:
    for kernels in (native, reference):
        for fields in ({}, {"top_k": 1}, {"top_p": 0.5, "min_p": 0.5}):
            assert support(kernels, torch.tensor([[logit]]), draws=2, **fields) == {0}


def test_infinities(native: NativeKernels, reference: Kernels) -> None:
    inf = math.inf
    none, one = torch.full((1, 200), -inf), torch.full((1, 200), -inf)
    one[0, 199] = -1e30
    two = torch.full((1, 200), 1e38)
    two[0, [7, 130]] = inf
    for kernels in (native, reference):
        for fields in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}):
            assert support(kernels, none, draws=5, **fields) == {0}
            assert support(kernels, one, draws=5, **fields) == {199}
            shared = {7} if fields.get("temperature") == 0.0 else {7, 130}
            assert support(kernels, two, draws=50, **fields) == shared
        assert support(kernels, two, draws=50, top_k=1, top_p=0.5) == {7}


def test_only_the_best_logit_has_the_best_score(native: NativeKernels, reference: Kernels) -> None:
    """However small the differences and high the temperature: what draws from one token is greedy."""
    logits = torch.tensor([[3e38, -3e38, -2.9e38, 0.0]])
    tiny = torch.tensor([[0.0, 1e-45, 0.0, 1e-45]])
    warm = torch.tensor([[1.0, 1.0 + 2**-23, 1.0 + 2**-23]])
    for kernels in (native, reference):
        assert support(kernels, logits, draws=50) == {0}
        assert support(kernels, logits, draws=50, top_k=3) == {0}
        for fields in ({"top_k": 1}, {"top_p": 0.0}):
            assert support(kernels, tiny, temperature=2.0, **fields) == {1}
            assert support(kernels, warm, temperature=3e38, **fields) == {1}
        assert support(kernels, tiny, temperature=2.0, min_p=1.0) == {1, 3}


# Few distinct values, so that ties are everywhere, and some that cannot be drawn at all.
few_values = st.sampled_from(
    [(0.0,), (0.0, 1.0), (-math.inf, 2.0), (-math.inf, -90.0, -1.0, 0.0, 0.5), (-0.0, 0.0, -1e-3)]
)


def kept_by_definition(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """With a stable sort of everything, in the order of (probability, lowest id)."""
    values = logits.double().tolist()
    best = max(values)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    order = [t for t in order if values[t] > -math.inf or best == -math.inf]
    weights = {t: math.exp(values[t] - best) for t in order}
    order = [t for t in order if weights[t] >= min_p][: top_k or None]
    total, mass, kept = math.fsum(weights[t] for t in order), 0.0, list[int]()
    for token in order:
        if kept and top_p < 1 and mass >= top_p * total * (1 - 1e-12):
            break
        kept.append(token)
        mass += weights[token]
    return sorted(kept)


@given(
    vocab=vocabs,
    values=few_values,
    top_k=st.sampled_from([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 1000, 2**31 - 1]),
    top_p=st.sampled_from(
        [0.0, float(np.float32(1 / math.pi)), float(np.float32(3**0.5 - 1)), 1.0]
    ),
    min_p=st.sampled_from([0.0, 0.4, 1.0]),
    seed=seeds,
)
def test_filters_among_ties_keep_exactly_what_they_say(
    native: NativeKernels,
    reference: Kernels,
    vocab: int,
    values: tuple[float, ...],
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.choice(np.float32(values), size=vocab))
    if bool((logits == -math.inf).all()):
        logits[-1] = 0.0
    fields = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = sample_rows(8, seed=seed, **fields)
    rows["position"] = np.arange(8)
    kept = kept_by_definition(logits, top_k, top_p, min_p)
    mine = filtered_scores(logits, rows[0])
    assert mine.isfinite().nonzero()[:, 0].tolist() == kept
    only = torch.full_like(logits, -math.inf)
    only[kept] = logits[kept]
    plain = sample_rows(8, seed=seed)
    plain["position"] = rows["position"]
    for kernels in (native, reference):
        drawn = kernels.sample(logits.repeat(8, 1), rows).token_ids
        assert drawn.tolist() == kernels.sample(only.repeat(8, 1), plain).token_ids.tolist()
        if top_k == 1 or top_p == 0:
            assert set(drawn.tolist()) == set(kernels.sample(logits[None], None).token_ids.tolist())


def test_logits_are_left_as_they_are(native: NativeKernels, reference: Kernels) -> None:
    logits = randn(4, 300, rng=generator(3))
    before = logits.clone()
    for kernels in (native, reference):
        kernels.sample(logits, sample_rows(4, top_k=3, top_p=0.5, min_p=0.1))
        assert torch.equal(logits, before)
        assert kernels.sample(logits[:0], None).token_ids.shape == (0,)


def test_sample_refuses_wrong_arguments(native: NativeKernels, reference: Kernels) -> None:
    logits, rows = torch.zeros(2, 8), sample_rows(2)
    wide = np.zeros((2, 2), dtype=SAMPLE_ROW)
    for kernels in (native, reference):
        for args in (
            (logits.half(), rows),
            (logits[0], rows),
            (torch.zeros(8, 2).t(), rows),
            (logits[:, :0], rows),
            (logits, rows[:1]),
            (logits, sample_rows(4)[::2]),
            (logits, wide),
            (logits, np.zeros(2)),
        ):
            with pytest.raises(KernelArgumentError):
                kernels.sample(*args)
        for name, values in {
            "temperature": (-0.5, math.nan, math.inf),
            "top_p": (-0.1, 1.1, math.nan),
            "min_p": (-0.1, 1.1, math.nan),
            "top_k": (-1,),
        }.items():
            for value in values:
                wrong = sample_rows(2)
                wrong[name][1] = value
                with pytest.raises(KernelArgumentError, match=name):
                    kernels.sample(logits, wrong)

"""The sampler against plain definitions, and rows against themselves alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.base import create_kernels
from quire.sampling.sampler import Sampler, SamplingRow, SamplingState, filter_scores
from quire.sampling_params import SamplingParams

VOCAB = 40
SAMPLER = Sampler(create_kernels("auto"))


def row(params: SamplingParams, *, seed=0, prompt=(), output=(), eos=(), position=None, id_=1):
    tokens = [*prompt, *output]
    state = SamplingState(
        params, seed=seed, eos_token_ids=list(eos), token_ids=tokens,
        num_prompt_tokens=len(prompt), vocab_size=VOCAB,
    )  # fmt: skip
    where = len(tokens) if position is None else position
    return SamplingRow(id_, state, where, len(output))


def logits(rows=1, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * spread


def plain_filter(scores: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Kept tokens by the definitions, in double precision."""
    kept = set(range(len(scores)))
    weights = [math.exp(s) for s in scores]
    kept = {i for i in kept if weights[i] >= min_p * max(weights)}
    if top_k > 0:
        threshold = sorted((scores[i] for i in kept), reverse=True)[:top_k][-1]
        kept = {i for i in kept if scores[i] >= threshold}
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, set()
    for i in sorted(kept, key=lambda i: -scores[i]):
        if mass >= top_p * total and nucleus:
            break
        nucleus.add(i)
        mass += weights[i]
    return nucleus if top_p < 1.0 else kept


@given(
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB, 100]),
    top_p=st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.5, 1.0]),
)
def test_filters_keep_what_the_definitions_keep(seed, top_k, top_p, min_p):
    scores = logits(seed=seed)[0]
    scores -= scores.max()
    expected = plain_filter(scores.double().tolist(), top_k, top_p, min_p)
    filter_scores(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(torch.isfinite(scores).nonzero().flatten().tolist()) == expected


def test_a_flat_distribution_over_a_large_vocabulary_needs_the_full_sort():
    scores = torch.zeros(5000)
    filter_scores(scores, top_k=0, top_p=0.5, min_p=0.0)
    assert 2499 <= int(torch.isfinite(scores).sum()) <= 2501


def test_samples_follow_the_softmax():
    params = SamplingParams(temperature=0.7)
    values = logits(seed=3, spread=1.0)
    expected = torch.softmax(values[0] / 0.7, -1)
    draws = 20_000
    rows = [row(params, seed=7, position=i) for i in range(draws)]
    results = SAMPLER.sample(values.repeat(draws, 1), rows)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in results]), minlength=VOCAB)
    chi_square = float(((counts - draws * expected) ** 2 / (draws * expected)).sum())
    # 39 degrees of freedom: 83 is the 1 in 20,000 quantile; the draw is fixed by the seed.
    assert chi_square < 83


def test_a_rows_token_depends_on_seed_and_position_alone():
    params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, top_k=30)
    values = logits(rows=64)
    rows = [row(params, seed=i, position=100 + i) for i in range(64)]
    together = [r.token_ids for r in SAMPLER.sample(values.clone(), rows)]
    alone = [SAMPLER.sample(values[i : i + 1].clone(), [rows[i]])[0].token_ids for i in range(64)]
    assert together == alone
    other_seed = [row(params, seed=i + 1000, position=100 + i) for i in range(64)]
    other_place = [row(params, seed=i, position=200 + i) for i in range(64)]
    assert [r.token_ids for r in SAMPLER.sample(values.clone(), other_seed)] != together
    assert [r.token_ids for r in SAMPLER.sample(values.clone(), other_place)] != together


def test_greedy_and_random_rows_mix():
    values = logits(rows=4)
    greedy, random = SamplingParams(temperature=0.0), SamplingParams(temperature=2.0)
    rows = [row(p, seed=1) for p in (greedy, random, greedy, random)]
    results = SAMPLER.sample(values.clone(), rows)
    assert results[0].token_ids == [int(values[0].argmax())]
    assert results[2].token_ids == [int(values[2].argmax())]


def test_penalties_are_vllms_formulas():
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2,
        logprobs=VOCAB,
    )  # fmt: skip
    values = logits(seed=5)
    expected = values[0].clone()
    prompt, output = [3, 3, 4], [4, 9, 9]
    for token in {3, 4, 9}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in output:
        expected[token] -= 0.3
    for token in set(output):
        expected[token] -= 0.2
    edited = values.clone()
    (result,) = SAMPLER.sample(edited, [row(params, prompt=prompt, output=output)])
    torch.testing.assert_close(edited[0], expected)
    assert result.token_ids == [int(expected.argmax())]
    # Logprobs are of the model, before penalties.
    raw = torch.log_softmax(values[0], -1)
    assert result.logprobs is not None
    entry = result.logprobs[0]
    assert entry.logprob == pytest.approx(float(raw[entry.token_id]))
    assert entry.top_ids == raw.argsort(descending=True).tolist()
    assert entry.rank == entry.top_ids.index(entry.token_id) + 1


def test_history_grows_with_what_is_sampled():
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    values = torch.zeros(1, VOCAB)
    values[0, :3] = torch.tensor([5.0, 4.0, 3.5])
    one = row(params)
    tokens = []
    for index in range(4):
        step = SamplingRow(1, one.state, index, index)
        tokens += SAMPLER.sample(values.clone(), [step])[0].token_ids
    assert tokens == [0, 1, 2, 0]


def test_no_end_token_before_min_tokens():
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[5])
    values = torch.zeros(1, VOCAB)
    values[0, 2], values[0, 5], values[0, 6] = 9.0, 8.0, 7.0
    early = row(params, output=[1], eos=[2])
    late = row(params, output=[1, 1], eos=[2])
    assert SAMPLER.sample(values.clone(), [early])[0].token_ids == [6]
    assert SAMPLER.sample(values.clone(), [late])[0].token_ids == [2]


def test_nan_is_that_rows_error_alone():
    values = logits(rows=3)
    values[1, 7] = math.nan
    rows = [row(SamplingParams(temperature=t), id_=i) for i, t in enumerate((0.0, 1.0, 1.0))]
    results = SAMPLER.sample(values, rows)
    assert [bool(r.error) for r in results] == [False, True, False]
    assert results[1].token_ids == [] and len(results[2].token_ids) == 1

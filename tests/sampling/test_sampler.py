"""The sampler against plain definitions, and rows against themselves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.decoding import Decoding
from quire.kernels.reference import filtered_scores
from quire.kernels.select import create_kernels
from quire.messages import AdmittedRequest
from quire.sampling.logprobs import log_softmax, top_logprobs
from quire.sampling.sampler import NO_DRAFT, Sampled, Sampler, SamplingSeats

VOCAB = 40
SAMPLER = Sampler(create_kernels("auto"))


@dataclass(frozen=True)
class Row:
    request: AdmittedRequest
    position: int


def row(decoding: Decoding, *, seed=0, prompt=(), output=(), eos=(), position=None):
    tokens = [*prompt, *output]
    request = AdmittedRequest(
        request_id=1, token_ids=tokens, num_prompt_tokens=len(prompt), block_ids=([],),
        decoding=msgspec.structs.replace(decoding, seed=seed, end_token_ids=frozenset(eos)),
    )  # fmt: skip
    return Row(request, len(tokens) if position is None else position)


def seated(rows: list[Row]) -> SamplingSeats:
    table = SamplingSeats(len(rows), VOCAB)
    for seat, one in enumerate(rows):
        table.admit(seat, one.request)
    return table


def sample(values: torch.Tensor, rows: list[Row]) -> Sampled:
    positions = np.array([one.position for one in rows])
    return SAMPLER.sample(values, seated(rows), np.arange(len(rows)), positions)


def tokens_of(values: torch.Tensor, rows: list[Row]) -> list[int]:
    sampled = sample(values, rows)
    assert sampled.valid.all()
    return sampled.token_ids.tolist()


def logits(rows=1, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * spread


def plain_filter(scores: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Kept tokens by the definitions, in double precision."""
    kept = set(range(len(scores)))
    weights = [math.exp(s) for s in scores]
    kept = {i for i in kept if weights[i] >= min_p * max(weights)}
    if top_k > 0:
        kept = set(sorted(kept, key=lambda i: (-scores[i], i))[:top_k])
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, set()
    for i in sorted(kept, key=lambda i: (-scores[i], i)):
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
    """The reference's; tests/kernels/test_sampling.py holds the C kernel to the reference."""
    values = logits(seed=seed)
    scores = (values[0] - values[0].max()).double().tolist()
    expected = plain_filter(scores, top_k, top_p, min_p)
    params = Decoding(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    table = seated([row(params)])
    (wants,) = table.rows(np.array([0]), np.array([0]))
    kept = filtered_scores(values[0], wants)
    assert set(torch.isfinite(kept).nonzero().flatten().tolist()) == expected
    drawn = tokens_of(values.repeat(50, 1), [row(params, seed=i) for i in range(50)])
    assert set(drawn) <= expected


def test_samples_follow_the_softmax():
    params = Decoding(temperature=0.7)
    values = logits(seed=3, spread=1.0)
    expected = torch.softmax(values[0] / 0.7, -1)
    draws = 20_000
    rows = [row(params, seed=7, position=i) for i in range(draws)]
    tokens = tokens_of(values.repeat(draws, 1), rows)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    chi_square = float(((counts - draws * expected) ** 2 / (draws * expected)).sum())
    # 39 degrees of freedom: 83 is the 1 in 20,000 quantile; the draw is fixed by the seed.
    assert chi_square < 83


def test_a_rows_token_depends_on_seed_and_position_alone():
    params = Decoding(temperature=1.0, top_p=0.9, min_p=0.01, top_k=30)
    values = logits(rows=64)
    rows = [row(params, seed=i, position=100 + i) for i in range(64)]
    together = tokens_of(values.clone(), rows)
    alone = [tokens_of(values[i : i + 1].clone(), [rows[i]])[0] for i in range(64)]
    assert together == alone
    other_seed = [row(params, seed=i + 1000, position=100 + i) for i in range(64)]
    other_place = [row(params, seed=i, position=200 + i) for i in range(64)]
    assert tokens_of(values.clone(), other_seed) != together
    assert tokens_of(values.clone(), other_place) != together


def test_greedy_and_random_rows_mix():
    values = logits(rows=4)
    greedy, random = Decoding(temperature=0.0), Decoding(temperature=2.0)
    tokens = tokens_of(values.clone(), [row(p, seed=1) for p in (greedy, random, greedy, random)])
    assert tokens[0] == int(values[0].argmax())
    assert tokens[2] == int(values[2].argmax())


def test_a_seat_is_sampled_as_its_present_request_wants():
    greedy, random = Decoding(temperature=0.0), Decoding(temperature=1.0, top_k=3)
    penalized = Decoding(temperature=0.0, presence_penalty=2.0, logprobs=1)
    table, seats, position = (
        SamplingSeats(2, VOCAB),
        np.array([1]),
        np.array([4]),
    )
    for params in (random, penalized, greedy, random, greedy):
        one = row(params, seed=9, prompt=[1, 2], output=[3, 3])
        table.admit(1, one.request)
        sampled = SAMPLER.sample(logits(seed=8), table, seats, position)
        fresh = sample(logits(seed=8), [one])
        assert sampled.token_ids.tolist() == fresh.token_ids.tolist()
        assert sampled.logprobs == fresh.logprobs
        assert (table.rows(seats, position) is None) == params.is_greedy
        table.release(1)


def test_penalties_are_vllms_formulas():
    params = Decoding(
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
    sampled = sample(edited, [row(params, prompt=prompt, output=output)])
    torch.testing.assert_close(edited[0], expected)
    assert sampled.token_ids.tolist() == [int(expected.argmax())]
    # Logprobs are of the model, before penalties.
    raw = torch.log_softmax(values[0], -1)
    entry = sampled.logprobs[0]
    assert entry.logprob == pytest.approx(float(raw[entry.token_id]))
    assert entry.top_ids == raw.argsort(descending=True).tolist()
    assert entry.rank == entry.top_ids.index(entry.token_id) + 1


def test_only_rows_that_ask_are_edited_and_told():
    plain, wanting = Decoding(temperature=0.0), Decoding(temperature=0.0, logprobs=2)
    edited = Decoding(temperature=0.0, presence_penalty=1.0)
    values = logits(rows=3)
    before = values.clone()
    rows = [row(plain, output=[1]), row(wanting, output=[1]), row(edited, output=[1])]
    sampled = sample(values, rows)
    assert list(sampled.logprobs) == [1] and len(sampled.logprobs[1].top_ids) == 2
    assert torch.equal(values[:2], before[:2]) and not torch.equal(values[2], before[2])


def test_history_grows_with_what_is_sampled():
    params = Decoding(temperature=0.0, frequency_penalty=2.0)
    values = torch.zeros(1, VOCAB)
    values[0, :3] = torch.tensor([5.0, 4.0, 3.5])
    table, seat = seated([row(params)]), np.array([0])
    tokens = []
    for index in range(4):
        sampled = SAMPLER.sample(values.clone(), table, seat, np.array([index]))
        tokens += sampled.token_ids.tolist()
    assert tokens == [0, 1, 2, 0]


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_no_logprob_is_nan_where_a_penalty_makes_logits_infinite(mode):
    params = Decoding(temperature=1.0, repetition_penalty=1e-38, logprobs=3)
    values = torch.full((1, VOCAB), -1.0)
    values[0, 4], values[0, 7] = 5.0, 6.0
    table, seat = seated([row(params, output=[4, 7])]), np.array([0])
    sampler = Sampler(create_kernels("native"), logprobs_mode=f"{mode}_logprobs")
    found = sampler.sample(values, table, seat, np.array([2])).logprobs[0]
    assert not any(map(math.isnan, [found.logprob, *found.top_logprobs]))
    if mode == "processed":
        assert found.top_ids == [4, 7, 0]
        assert found.top_logprobs == pytest.approx([-math.log(2), -math.log(2), -math.inf])


def test_no_end_token_before_min_tokens():
    params = Decoding(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({5}))
    values = torch.zeros(1, VOCAB)
    values[0, 2], values[0, 5], values[0, 6] = 9.0, 8.0, 7.0
    early = row(params, output=[1], eos=[2])
    late = row(params, output=[1, 1], eos=[2])
    assert tokens_of(values.clone(), [early]) == [6]
    assert tokens_of(values.clone(), [late]) == [2]
    table, seat = seated([early]), np.array([0])
    for position, expected in ((1, 6), (2, 2), (3, 2)):
        sampled = SAMPLER.sample(values.clone(), table, seat, np.array([position]))
        assert sampled.token_ids.tolist() == [expected]
    assert table.states(seat, np.array([4])) == {}


def test_a_wrong_draft_past_min_tokens_does_not_lift_the_ban():
    params = Decoding(temperature=0.0, min_tokens=3)
    values = torch.zeros(3, VOCAB)
    values[:, 2], values[:, 6] = 9.0, 7.0
    table, seats = seated([row(params, output=[1], eos=[2])]), np.zeros(3, dtype=np.int64)
    drafts = np.array([NO_DRAFT, 7, 7])
    sampled = SAMPLER.sample(values.clone(), table, seats, np.array([1, 2, 3]), None, drafts)
    assert sampled.token_ids.tolist() == [6, 6, 2]
    sampled = SAMPLER.sample(values[:1].clone(), table, seats[:1], np.array([2]))
    assert sampled.token_ids.tolist() == [6]


def test_penalties_after_drafts_count_them_and_forget_them():
    """As if each draft were known; afterwards only the first token is."""
    params = Decoding(
        presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=2.0, logprobs=0
    )
    values = torch.zeros(3, VOCAB)
    values[:, 3], values[:, 4], values[:, 5] = 12.0, 11.0, 10.0
    one, seats = row(params, prompt=[9], output=[4]), np.zeros(3, dtype=np.int64)
    drafts = [3, 5]
    expected = [
        tokens_of(values[:1].clone(), [row(params, prompt=[9], output=[4, *drafts[:count]])])[0]
        for count in range(3)
    ]
    table, positions = seated([one]), np.arange(2, 5)
    sampled = SAMPLER.sample(
        values.clone(), table, seats, positions, None, np.array([NO_DRAFT, *drafts])
    )
    assert sampled.token_ids.tolist() == expected == [3, 5, 3]
    assert set(sampled.logprobs) == {0, 1, 2}, "both drafts are right"
    [state] = table.states(seats[:1], positions[1:2]).values()
    assert state.counts.nonzero().flatten().tolist() == [3, 4]
    assert state.seen.nonzero().flatten().tolist() == [3, 4, 9]
    wrong = np.array([NO_DRAFT, 8, 3])
    sampled = SAMPLER.sample(values.clone(), seated([one]), seats, positions, None, wrong)
    assert set(sampled.logprobs) == {0}


def test_nan_is_that_rows_error_alone():
    values = logits(rows=4)
    values[1, 7] = values[3, 0] = math.nan
    plain = [row(Decoding(temperature=t)) for t in (0.0, 1.0, 1.0)]
    asking = row(Decoding(temperature=1.0, logprobs=1, presence_penalty=1.0))
    sampled = sample(values, [*plain, asking])
    assert np.flatnonzero(~sampled.valid).tolist() == [1, 3]
    assert sampled.logprobs == {}


@given(
    vocab=st.sampled_from([1, 5, 64, 300]),
    values=st.sampled_from([(0.0,), (-math.inf, -2.0, -1.0), (-0.0, 0.0, -1.5, -2.5)]),
    count=st.sampled_from([-1, 0, 1, 2, 7, 64, 1000]),
    seed=st.integers(0, 10**6),
)
def test_the_top_logprobs_are_in_the_order_of_value_then_id(vocab, values, count, seed):
    """Where the list ends among ties too."""
    drawn = np.random.default_rng(seed).choice(np.float32(values), size=(3, vocab))
    entries = top_logprobs(torch.tensor(drawn), [0, vocab - 1, vocab // 2], count)
    for one, entry in zip(drawn.tolist(), entries, strict=True):
        order = sorted(range(vocab), key=lambda token: (-one[token], token))
        expected = order[: vocab if count == -1 else count]
        assert entry.top_ids == expected
        assert entry.top_logprobs == [one[token] for token in expected]


def test_a_rows_logprobs_do_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch):
    """Whatever PyTorch does for so many rows: it is asked for one at a time."""
    real, values = torch.log_softmax, logits(rows=9, seed=5)
    alone = torch.stack([real(row, dim=-1) for row in values])
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: real(x, dim) * (1 + x.dim()) / 2)
    for rows in (1, 4, 9):
        assert torch.equal(log_softmax(values[:rows]), alone[:rows])

"""Against `ReferenceKernels.sample`: the same token, but for the rounding of sums and logarithms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.decoding import Decoding
from quire.kernels.checks import KernelArgumentError
from quire.kernels.philox import gumbel_from_uniform
from quire.kernels.reference import ReferenceKernels, filtered_scores
from quire.kernels.sampling import sample_row
from quire.kernels.triton.sampling import DeviceTokens, SampleWorkspace, processed, sample
from quire.kernels.triton.seats import as_words
from quire.sampling import logprobs
from tests.kernels.cases import generator, randn, seeds

# NumPy warns of what a kernel computes and then does not choose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
REFERENCE = ReferenceKernels()
OFF = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": 0, "position": 0}
HUGE = 2**31 - 1


def record(fields: dict[str, Any]) -> np.void:
    row = sample_row(Decoding(**{name: fields[name] for name in fields if name != "position"}))
    row["position"] = fields.get("position", 0)
    return row


def seat_table(rows: list[dict[str, Any]]) -> Tensor:
    return torch.from_numpy(as_words(np.stack([record(row) for row in rows])))


def draw(logits: Tensor, rows: list[dict[str, Any]], **options: Any) -> DeviceTokens:
    """Row i in seat n - 1 - i, so that a row is not taken for its seat."""
    count, vocab = logits.shape
    return sample(
        logits,
        seat_table(rows[::-1]),
        torch.arange(count - 1, -1, -1, dtype=torch.int32),
        torch.tensor([row.get("position", 0) for row in rows]),
        SampleWorkspace.create(count, vocab, "cpu"),
        **options,
    )


def assert_is_drawn(logits: Tensor, fields: dict[str, Any], token: int) -> None:
    """By the reference's own scores and noise, in float64, from what it keeps at this top_p, a little
    less or a little more: sums differ in rounding. logits: [V]"""
    if fields["temperature"] == 0.0 or logits.max() == -torch.inf:
        assert token == int(logits.argmax())
        return
    u = REFERENCE.philox_uniform(fields["seed"], fields["position"], len(logits))
    noise = gumbel_from_uniform(u.double())
    for near in (1.0, 1 - 2e-6, 1 + 2e-6):
        row = record({**fields, "top_p": min(fields["top_p"] * near, 1.0)})
        noisy = filtered_scores(logits, row).double() + noise
        if float(noisy[token]) >= float(noisy.max()) - 1e-5:
            return
    raise AssertionError(f"token {token} is not what the reference draws with {fields}")


def random_logits(rows: int, vocab: int, spread: float, grain: float, seed: int) -> Tensor:
    """Strided rows; with a grain, many ties; some excluded."""
    rng = generator(seed)
    logits = randn(rows, vocab + 3, rng=rng)[:, :vocab] * spread
    if grain:
        logits = (logits / grain).round() * grain
    logits[torch.rand(rows, vocab, generator=rng) < 0.1] = -torch.inf
    return logits


wants = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([0.0, 1e-6, 0.3, 0.77, 0.95, 0.9999, 1 - 2**-24, 1.0, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.5, 1.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 50, 64, 65, 1000, HUGE]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "position": st.sampled_from([0, 77, 2**32 - 1, 2**40]),
    }
)


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([1, 2, 15, 63, 64, 65, 127, 400, 1111]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0, 1e4]),
    grain=st.sampled_from([0.0, 0.0, 0.5]),
    rows=st.lists(wants, min_size=2, max_size=2),
    seed=seeds,
)
def test_draws_what_the_reference_draws(
    vocab: int, spread: float, grain: float, rows: list[dict[str, Any]], seed: int
) -> None:
    logits = random_logits(len(rows), vocab, spread, grain, seed)
    before = logits.clone()
    result = draw(logits, rows)
    assert result.valid.all() and torch.equal(logits, before)
    for r, row in enumerate(rows):
        assert_is_drawn(logits[r], row, int(result.token_ids[r]))


LARGE = [  # V = 9,001: three tiles, the last of 13 groups and one token; lists of over 64 groups
    {"temperature": 1.0},
    {"temperature": 0.0, "top_p": 0.5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 140, "min_p": 1e-4},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 1.0, "top_k": 5000, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.001},
]


@pytest.mark.parametrize("grain", [0.0, 0.5])
def test_draws_what_the_reference_draws_over_several_tiles(grain: float) -> None:
    rows = [{**OFF, **row, "seed": -i, "position": 2**33 + i} for i, row in enumerate(LARGE)]
    logits = random_logits(len(rows), 9001, 2.0, grain, 5)
    result = draw(logits, rows)
    for r, row in enumerate(rows):
        assert_is_drawn(logits[r], row, int(result.token_ids[r]))
    # One by one, in another workspace and at another address: the very same.
    for r in (0, 3, 4):
        alone = draw(logits[r : r + 1].clone(), rows[r : r + 1])
        assert torch.equal(alone.token_ids, result.token_ids[r : r + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype: torch.dtype) -> None:
    rows = [{**OFF, "seed": 3}, {**OFF, "top_k": 30}, {**OFF, "top_p": 0.9}, {"temperature": 0.0}]
    logits = random_logits(4, 300, 3.0, 0.0, 9).to(dtype)
    result = draw(logits, rows)
    wide = draw(logits.float(), rows)
    assert torch.equal(result.token_ids, wide.token_ids)


def test_what_the_host_knows_changes_nothing() -> None:
    logits = random_logits(3, 5000, 2.0, 0.5, 1)
    greedy, draws = [{"temperature": 0.0}] * 3, [{**OFF, "seed": i} for i in range(3)]
    want = draw(logits, greedy).token_ids
    assert torch.equal(want, logits.argmax(dim=1))
    for level in ("greedy", "draw"):
        assert torch.equal(draw(logits, greedy, level=level).token_ids, want)
    plain = draw(logits, draws, level="draw")
    assert torch.equal(draw(logits, draws).token_ids, plain.token_ids)


def test_ties_at_the_cut_stay_in_the_order_of_ids() -> None:
    """All alike: with top_p p, the first ceil(p * V) of them, across groups and chunks of groups."""
    vocab, allowed = 5000, 2100
    noise = [gumbel_from_uniform(REFERENCE.philox_uniform(s, 0, vocab)) for s in range(12)]
    seeds = [s for s, n in enumerate(noise) if int(n.argmax()) > allowed][:3]
    rows = [{**OFF, "top_p": (allowed - 0.5) / vocab, "seed": s} for s in seeds]
    result = draw(torch.zeros(len(rows), vocab), rows)
    assert result.token_ids.tolist() == [int(noise[s][:allowed].argmax()) for s in seeds]
    tied = torch.zeros(1, 200)
    tied[0, 100:] = -0.0
    assert int(draw(tied, [{"temperature": 0.0}]).token_ids) == 0


@pytest.mark.parametrize(
    ("distances", "fields", "kept"),
    [
        ([0.02, 0.0, 0.03, 0.01, 0.04], {"top_k": 3}, {0, 1, 3}),
        ([0.02, 0.0, 0.02, 0.01, 0.04], {"top_k": 3}, {0, 1, 3}),
        ([0.02, 0.0, 0.02, 0.0, 0.02], {"top_k": 4}, {0, 1, 2, 3}),
        ([0.0] * 100, {"top_k": 1}, {0}),
        ([0.3] * 70 + [0.0, 0.3], {"top_k": 2, "min_p": 0.1}, {0, 70}),
        ([0.0, 1.0, 1.0] + [3.0] * 97, {"min_p": 0.1, "top_p": 0.5}, {0}),
        ([0.0, 1.0, 1.0] + [3.0] * 97, {"min_p": 0.1, "top_p": 0.6}, {0, 1}),
        ([0.0, 0.1, 0.2, 0.2] + [0.3] * 96, {"top_k": 3, "top_p": 0.5}, {0, 1}),
        ([0.0, 0.1, 0.1, 0.1, 0.1], {"top_k": 3, "top_p": 0.7}, {0, 1, 2}),
        ([0.0, 0.1, 0.1, 0.1, 0.1], {"top_k": 4, "top_p": 0.5}, {0, 1}),
    ],
)
def test_filters_keep_exactly(
    distances: list[float], fields: dict[str, float], kept: set[int]
) -> None:
    """vLLM's order: min_p, then top_k, then top_p of what is left; ties by id."""
    rows = [{**OFF, **fields, "position": p} for p in range(16)]
    assert set(draw(-torch.tensor([distances] * 16), rows).token_ids.tolist()) == kept


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([1, 5, 64, 65, 300]),
    values=st.sampled_from([(0.0,), (-0.0, 0.0, 1.0), (-math.inf, -90.0, -1.0, 0.0, 0.5)]),
    fields=wants,
    seed=seeds,
)
def test_filters_among_ties_keep_what_the_reference_keeps(
    vocab: int, values: tuple[float, ...], fields: dict[str, Any], seed: int
) -> None:
    """Drawn with the filters, and without them from what the reference keeps: the same tokens."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.choice(np.float32(values), size=vocab))
    logits[vocab // 2] = 0.0
    if fields["temperature"] == 0:
        fields = {**fields, "temperature": 1.0}
    kept = filtered_scores(logits, record(fields)).isfinite()
    only = torch.where(kept, logits, -torch.inf)
    off = {name: OFF[name] for name in ("top_p", "min_p", "top_k")}
    rows = [{**fields, "position": position} for position in range(3)]
    unfiltered = [{**row, **off} for row in rows]
    drawn = draw(logits.repeat(3, 1), rows).token_ids
    assert torch.equal(drawn, draw(only.repeat(3, 1), unfiltered).token_ids)
    if fields["top_k"] == 1 or fields["top_p"] == 0:
        assert set(drawn.tolist()) == {int(logits.argmax())}


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([1, 2, 63, 65, 400, 4200]),
    values=st.sampled_from([(0.0,), (-0.0, 0.0, 1.0), (-math.inf, -90.0, -1.0, 0.0, 0.5)]),
    fields=st.lists(wants, min_size=3, max_size=3),
    in_place=st.booleans(),
    seed=seeds,
)
def test_processed_logits_are_those_of_the_sampler(
    vocab: int, values: tuple[float, ...], fields: list[dict[str, Any]], in_place: bool, seed: int
) -> None:
    """Of the rows that ask, and no others."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.choice(np.float32(values), size=(3, vocab)))
    logits[:, vocab // 2] = 0.0
    expected = torch.full_like(logits, 7.0)
    for row in (2, 0):
        expected[row] = logprobs.processed(logits[row], record(fields[row]))
    if in_place:
        expected[1] = logits[1]
    workspace = SampleWorkspace.create(3, vocab, "cpu")
    table, seats = seat_table(fields), torch.arange(3, dtype=torch.int32)
    positions = torch.tensor([row["position"] for row in fields])
    tokens = sample(logits, table, seats, positions, workspace).token_ids
    out = logits if in_place else torch.full_like(logits, 7.0)
    asking = torch.tensor([2, 0], dtype=torch.int32)
    processed(logits, asking, table, seats, workspace, out=out)
    assert torch.equal(out, expected)
    assert (out.gather(1, tokens[:, None])[[0, 2]] > -torch.inf).all()


def test_infinite_logits() -> None:
    for row in ({"temperature": 0.0}, OFF, {**OFF, "top_k": 2}, {**OFF, "top_p": 0.5}):
        none = draw(torch.full((1, 70), -torch.inf), [row])
        assert int(none.token_ids) == 0 and bool(none.valid)
        logits = torch.zeros(1, 70)
        logits[0, [3, 66]] = torch.inf
        drawn = {
            int(draw(logits, [{**row, "position": p}]).token_ids)
            for p in range(12 if row == OFF else 3)
        }
        assert drawn <= {3, 66}
        if row == OFF:
            assert drawn == {3, 66}


@pytest.mark.parametrize("bad", [math.nan, -math.nan])
def test_nan_and_padding_are_their_rows_alone(bad: float) -> None:
    rows = [{**OFF, "top_k": 5}, OFF, {**OFF, "top_p": 0.9}, {"temperature": 0.0}]
    logits = random_logits(4, 130, 2.0, 0.0, 4)
    want = draw(logits, rows).token_ids
    for r, row in enumerate(rows):
        spoilt = logits.clone()
        spoilt[r, 129] = bad
        spoilt[r, 7] = torch.inf
        result = draw(spoilt, rows)
        assert result.valid.tolist() == [i != r for i in range(4)], row
        others = [i for i in range(4) if i != r]
        assert int(result.token_ids[r]) == 0
        assert torch.equal(result.token_ids[others], want[others])
    padded = sample(
        logits,
        seat_table(rows),
        torch.tensor([0, -1, 2, -1], dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
        SampleWorkspace.create(8, 130, "cpu"),
    )
    assert padded.valid.tolist() == [True, False, True, False]
    assert padded.token_ids.tolist() == [int(want[0]), 0, int(want[2]), 0]


def test_counts_what_it_samples_where_there_are_penalties() -> None:
    rows = [
        {"frequency_penalty": 0.5},
        {"temperature": 0.0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -1.0},
    ]
    logits = torch.zeros(4, 50)
    logits[:, 7] = 1.0
    history = torch.zeros(4, 50, dtype=torch.int16)  # by seat: row 3 is in seat 0
    history[0, 7], history[1, 7] = 32767, -32768 + 5
    draw(logits, rows, history=history)
    assert history[:, 7].tolist() == [32767, -32768 + 6, 0, 1]
    assert int(history.count_nonzero()) == 3
    logits[0, 0] = math.nan
    draw(logits, rows, history=history)
    assert history[3, 7] == 1


def test_a_seed_is_all_of_its_64_bits_and_a_position_too() -> None:
    logits = torch.zeros(1, 4000)
    rows = [{**OFF, "seed": s, "position": p} for s in (0, 2**32, -1) for p in (0, 2**32, 2**62)]
    tokens = [int(draw(logits, [row]).token_ids) for row in rows]
    assert len(set(tokens)) == len(rows)


def test_wrong_arguments_are_refused() -> None:
    logits, table = torch.zeros(2, 10), seat_table([OFF, OFF])
    index, positions = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    space = SampleWorkspace.create(2, 10, "cpu")
    good = (logits, table, index, positions, space)
    sample(*good)
    empty = sample(logits[:0], table, index[:0], positions[:0], space)
    assert empty.token_ids.shape == empty.valid.shape == (0,)
    for place, wrong in (
        (0, logits.double()),
        (0, logits.T),
        (1, table[:, :5]),
        (2, index.long()),
        (3, positions[:1]),
        (3, positions.double()),
        (4, SampleWorkspace.create(1, 10, "cpu")),
        (4, SampleWorkspace.create(2, 5000, "cpu")),
    ):
        arguments: list[Any] = list(good)
        arguments[place] = wrong
        with pytest.raises(KernelArgumentError):
            sample(*arguments)
    with pytest.raises(KernelArgumentError, match="history"):
        sample(*good, history=torch.zeros(2, 11, dtype=torch.int16))


@pytest.mark.parametrize("top_p", [0.5, 0.95])
def test_top_p_alone_lists_about_the_groups_that_it_keeps(top_p: float) -> None:
    """Of logits with a head and a long tail, as models give them: all groups are within the distance that
    bounds what top_p may remove."""
    vocab = 40_000
    ranks = torch.arange(1, vocab + 1)[torch.randperm(vocab, generator=generator(3))]
    logits = -1.5 * ranks.float().log()[None] + 0.1 * randn(1, vocab, rng=generator(4))
    fields = {**OFF, "top_p": top_p, "seed": 5}
    space = SampleWorkspace.create(1, vocab, "cpu")
    space.listed.fill_(-1)
    drawn = sample(
        logits,
        seat_table([fields]),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1).long(),
        space,
    )
    assert_is_drawn(logits[0], fields, int(drawn.token_ids[0]))
    probabilities = logits[0].double().softmax(-1).sort(descending=True)
    kept = probabilities.indices[: int((probabilities.values.cumsum(0) < top_p).sum()) + 1]
    groups, listed = len((kept // 64).unique()), int((space.listed >= 0).sum())
    assert groups <= listed <= 2 * groups + 1

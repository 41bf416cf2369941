"""What may come next because of what came before."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.decoding import Decoding, TokenRules
from quire.kernels.select import create_kernels
from quire.sampling.rules import MAX_FORCED, RequestRules
from quire.sampling.sampler import Sampler
from quire.structured.base import GrammarError, NoTokenLeftError
from quire.structured.masks import Mask, mask_of, tokens_of
from tests.sampling.test_sampler import SAMPLER, VOCAB, logits, row, sample, seated

EOS = 39
ALL = set(range(VOCAB))


class Sequence:
    """A grammar that allows one of some texts, token by token."""

    num_bytes = 0

    def __init__(self, *texts: list[int]) -> None:
        self.texts = texts

    def matcher(self) -> Sequence.Matcher:
        return Sequence.Matcher(self.texts)

    class Matcher:
        def __init__(self, texts) -> None:
            self._texts, self._at = list(texts), 0

        def fill_mask(self, row: Mask) -> None:
            if not self._texts:
                raise GrammarError("gone")
            going = {t[self._at] if self._at < len(t) else EOS for t in self._texts}
            row[:] = mask_of(sorted(going), VOCAB)

        def accept(self, token_id: int) -> bool:
            left = [t for t in self._texts if self._at < len(t) and t[self._at] == token_id]
            if left:
                self._texts, self._at = left, self._at + 1
            return bool(left)

        @property
        def is_finished(self) -> bool:
            return all(self._at == len(t) for t in self._texts)

        def forced(self) -> list[int]:
            raise AssertionError("the rules look at the whole mask")

        def copy(self) -> Sequence.Matcher:
            twin = Sequence.Matcher(self._texts)
            twin._at = self._at
            return twin


def rules(decoding=None, *, output=(), grammar=None, **fields) -> RequestRules:
    return RequestRules(
        msgspec.structs.replace(
            decoding or Decoding(),
            rules=TokenRules(**fields),
            end_token_ids=frozenset({EOS}),
        ),
        grammar,
        vocab_size=VOCAB,
        output=list(output),
    )


def allowed(of: RequestRules) -> set[int]:
    mask = of.mask()
    return ALL if mask is None else set(tokens_of(mask).tolist())


def test_only_allowed_tokens():
    assert allowed(rules(Decoding(allowed_token_ids=[3, 0, 31, 32]))) == {0, 3, 31, 32}


def test_before_min_tokens_an_allowed_end_is_no_way_out():
    """Else all tokens are banned, and one of them is sampled."""
    decoding = Decoding(
        max_tokens=9,
        min_tokens=2,
        allowed_token_ids=[7],
        stop_token_ids=frozenset({7}),
    )
    mine = RequestRules(decoding, None, vocab_size=64, output=[])
    allowed = []
    for _ in range(3):
        mask = mine.mask()
        allowed.append(bool(mask.any()))
        mine.learn(1)
    assert allowed == [False, False, True]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_tokens": 2, "allowed_token_ids": [EOS]}, ["allowed_token_ids", "min_tokens"]),
        ({"allowed_token_ids": [5], "bad_words": [[5]]}, ["allowed_token_ids", "bad_words"]),
        ({"bad_words": [[token] for token in ALL]}, ["bad_words"]),
        (
            {"min_tokens": 1, "thinking": True, "think_end": [EOS], "thinking_budget": 0},
            ["thinking_token_budget", "min_tokens"],
        ),
    ],
)
def test_constraints_that_leave_no_token_are_named(fields, named):
    """Also after a draft, which may be why."""
    own = ("min_tokens", "allowed_token_ids")
    decoding = Decoding(max_tokens=9, **{k: v for k, v in fields.items() if k in own})
    one = rules(decoding, **{k: v for k, v in fields.items() if k not in own})
    with pytest.raises(NoTokenLeftError) as raised:
        list(one.masks_along([3]))
    assert str(raised.value) == str(NoTokenLeftError(named))
    assert raised.value.param == named[0] and all(name in str(raised.value) for name in named)
    later = rules(Decoding(allowed_token_ids=[1, 5]), bad_words=[[1, 1], [1, 5]])
    masks = later.masks_along([1, 1])
    assert next(masks).any()
    with pytest.raises(NoTokenLeftError, match="allowed_token_ids and bad_words"):
        next(masks)


def test_bad_words_are_banned_where_they_would_be_completed():
    one = rules(bad_words=[[5], [1, 2], [1, 2, 3], [7, 7]])
    assert allowed(one) == ALL - {5}
    for token, banned in ((1, {5, 2}), (2, {5, 3}), (7, {5, 7}), (1, {5, 2}), (1, {5, 2})):
        one.learn(token)
        assert allowed(one) == ALL - banned


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 12))
def test_rules_are_a_function_of_the_tokens(tokens, cut):
    """As after a preemption: what was learnt one by one, and what is told at once."""
    fields = {
        "bad_words": [[0, 1], [2, 2, 3]], "think_start": [4], "think_end": [5, 0],
        "thinking": True, "thinking_budget": 3,
    }  # fmt: skip
    slowly = rules(output=tokens[:cut], **fields)
    for token in tokens[cut:]:
        slowly.learn(token)
    assert allowed(slowly) == allowed(rules(output=tokens, **fields))


def test_a_thinking_budget_closes_the_thinking_part():
    one = rules(think_start=[8], think_end=[9, 10], thinking=True, thinking_budget=3)
    for token in (1, 9, 2):  # half a marker counts as thought
        assert allowed(one) == ALL
        one.learn(token)
    for token in (9, 10):
        assert allowed(one) == {token}
        one.learn(token)
    assert allowed(one) == ALL
    one.learn(8)  # it begins to think again
    for _ in range(3):
        assert allowed(one) == ALL
        one.learn(1)
    assert allowed(one) == {9}


def test_a_marker_that_is_half_there_is_finished():
    one = rules(think_end=[9, 9, 10], thinking=True, thinking_budget=2, output=[1, 9])
    assert allowed(one) == {9}
    one.learn(9)
    assert allowed(one) == {10}


def test_a_budget_of_nothing():
    assert allowed(rules(think_end=[9], thinking=True, thinking_budget=0)) == {9}


def test_a_grammar_waits_for_the_end_of_thinking():
    one = rules(think_end=[9], thinking=True, grammar=Sequence([1, 2]))
    for token in (4, 5, 9):
        assert allowed(one) == ALL
        one.learn(token)
    assert allowed(one) == {1}


def test_a_grammar_with_other_rules():
    one = rules(
        Decoding(allowed_token_ids=[1, 2, 3]),
        bad_words=[[1, 2]],
        grammar=Sequence([1, 2], [1, 3], [1, 4]),
    )
    assert allowed(one) == {1}
    one.learn(1)
    assert allowed(one) == {3}
    one.learn(3)
    assert allowed(one) == {EOS}  # the text may end there, whatever else is allowed


def test_forced_tokens_are_those_that_would_be_sampled():
    grammar = Sequence([1, 2, 3, 4, 7], [1, 2, 3, 4, 8])
    one = rules(grammar=grammar, output=[1])
    assert one.forced(10) == [2, 3, 4] and allowed(one) == {7, 8}
    assert rules(grammar=grammar, output=[1]).forced(2) == [2, 3]
    done = rules(grammar=grammar, output=[1, 2, 3, 4, 7])
    assert done.forced(10) == [] and allowed(done) == {EOS}
    banned = rules(grammar=grammar, output=[1], bad_words=[[2, 3]])
    assert banned.forced(10) == [2] and allowed(banned) == set()
    long = Sequence([1] * 200)
    assert len(rules(grammar=long).forced(1000)) == MAX_FORCED


def test_nothing_is_forced_where_logprobs_are_wanted_or_in_thought():
    grammar = Sequence([1, 2, 3])
    assert rules(Decoding(logprobs=0), grammar=grammar).forced(9) == []
    assert rules(thinking=True, think_end=[9], grammar=grammar).forced(9) == []
    assert rules().forced(9) == []


class Grammars:
    def __init__(self, grammar) -> None:
        self._grammar = grammar

    def grammar(self, spec):
        return self._grammar


def test_masked_tokens_are_never_sampled():
    values = torch.zeros(2, VOCAB)
    values[:, 5] = 50.0
    only = row(Decoding(temperature=1.0, allowed_token_ids=[6, 7]))
    rows = [only, row(Decoding(temperature=0.0))]
    masks = {0: mask_of([6, 7], VOCAB)}
    sampled = SAMPLER.sample(values, seated(rows), np.arange(2), np.zeros(2, np.int64), masks)
    assert sampled.token_ids[0] in (6, 7)
    assert sampled.token_ids[1] == 5


def test_bias_is_added_before_penalties_and_not_to_logprobs():
    params = Decoding(
        temperature=0.0, logit_bias={3: 7.0, 4: -100.0}, repetition_penalty=2.0, logprobs=1
    )
    values = logits(seed=5)
    edited = values.clone()
    sampled = sample(edited, [row(params, prompt=[3])])
    biased = values[0].clone()
    biased[3] += 7.0
    biased[4] -= 100.0
    biased[3] = biased[3] / 2 if biased[3] > 0 else biased[3] * 2
    torch.testing.assert_close(edited[0], biased)
    assert sampled.logprobs[0].logprob == pytest.approx(
        float(torch.log_softmax(values[0], -1)[sampled.token_ids[0]])
    )


@pytest.mark.parametrize(
    "mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
)
def test_logprobs_modes(mode):
    params = Decoding(temperature=0.5, top_k=3, logit_bias={7: 2.0}, logprobs=VOCAB, seed=1)
    values = logits(seed=2)
    edited = values[0].clone()
    edited[7] += 2.0
    drawn = torch.full_like(edited, -torch.inf)
    best = edited.topk(3).indices
    drawn[best] = edited[best] / 0.5
    expected = {"raw": values[0].clone(), "processed": drawn}[mode.split("_")[0]]
    if mode.endswith("logprobs"):
        expected = torch.log_softmax(expected, -1)
    sampler = Sampler(create_kernels("auto"), logprobs_mode=mode)
    one = row(params)
    found = sampler.sample(values, seated([one]), np.array([0]), np.array([0])).logprobs[0]
    told = torch.empty(VOCAB)
    told[found.top_ids] = torch.tensor(found.top_logprobs)
    torch.testing.assert_close(told, expected)


def test_logprobs_of_asked_tokens():
    params = Decoding(logprobs=0, logprob_token_ids=[9, 2])
    values = logits(seed=1)
    raw = torch.log_softmax(values[0], -1)
    entry = sample(values, [row(params)]).logprobs[0]
    assert entry.top_ids == []
    np.testing.assert_allclose(entry.asked_logprobs, raw[[9, 2]])


def masks(of: RequestRules, drafts: list[int]) -> list[set[int]]:
    found = of.masks_along(drafts)
    return [ALL if mask is None else set(tokens_of(mask).tolist()) for mask in found]


FIELDS = {
    "bad_words": [[0, 1], [2, 2, 3]], "think_start": [4], "think_end": [5, 0], "thinking_budget": 3,
}  # fmt: skip


@given(
    st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=6), st.booleans()
)
def test_masks_along_drafts_are_those_after_them_and_leave_no_trace(output, drafts, thinking):
    one = rules(output=output, thinking=thinking, **FIELDS)
    expected = [
        allowed(rules(output=[*output, *drafts[:count]], thinking=thinking, **FIELDS))
        for count in range(len(drafts) + 1)
    ]
    assert masks(one, drafts) == expected
    pairs = zip(drafts, expected, strict=False)
    right = next((n for n, (draft, may) in enumerate(pairs) if draft not in may), len(drafts))
    assert one.num_allowed(drafts) == right
    assert allowed(one) == expected[0]


def test_drafts_along_a_grammar():
    texts = [[1, 2, 3], [1, 2, 4, 5], [7]]
    one = rules(grammar=Sequence(*texts))
    assert masks(one, [1, 2, 4]) == [{1, 7}, {2}, {3, 4}, {5}]
    assert masks(one, [1, 9, 4]) == [{1, 7}, {2}], (
        "nothing is accepted after a token that is refused"
    )
    assert masks(one, [7, EOS, 1]) == [{1, 7}, {EOS}], "nor after the end"
    assert [one.num_allowed(d) for d in ([1, 2, 4, 5], [1, 2, 9], [7, EOS], [8])] == [4, 2, 1, 0]
    assert allowed(one) == {1, 7}


def test_an_error_behind_a_draft_is_the_drafts_own():
    class Fragile(Sequence.Matcher):
        def accept(self, token_id: int) -> bool:
            found = super().accept(token_id)
            if self._at == 2:
                self._texts = []  # the next mask raises
            return found

    class Grammar(Sequence):
        def matcher(self):
            return Fragile(self.texts)

    Fragile.copy = lambda self: _moved(Fragile(self._texts), self._at)
    one = rules(grammar=Grammar([1, 2, 3]))
    along = one.masks_along([1, 2])
    assert [set(tokens_of(next(along))) for _ in range(2)] == [{1}, {2}]
    with pytest.raises(GrammarError):
        next(along)
    assert allowed(one) == {1}


def _moved(matcher, at):
    matcher._at = at
    return matcher


def test_forced_tokens_that_need_logprobs_are_drafts():
    grammar = Sequence([1, 2, 3, 4, 5], [1, 2, 3, 6])
    one = rules(Decoding(logprobs=0), grammar=grammar)
    assert one.forced(9) == [] and one.certain(9) == [1, 2, 3] and one.certain(2) == [1, 2]
    assert allowed(one) == {1}
    one = rules(grammar=grammar)
    assert one.certain(9) == [] and one.forced(9) == [1, 2, 3]
    assert rules().certain(9) == []

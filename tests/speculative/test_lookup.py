"""Drafts from texts: C and the plain version agree, and both with a search through everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.program import StepRows
from quire.placement import Placement
from quire.speculative.base import DraftTask
from quire.speculative.lookup import Lookup, LookupRules, owner_of

LENGTH = 200
SUFFIX = LookupRules(anchor=3, depth=8, most=6, votes=True, factor=2.0, least=0.3)
NGRAM = LookupRules(anchor=2, depth=5, most=6, factor=2.0)


def make(rules: LookupRules, *, seats: int = 3, **options: object) -> Lookup:
    rows = StepRows(
        np.full((seats, LENGTH), -7, dtype=np.int64),
        np.zeros((1, seats, 1), dtype=np.int32),
        np.zeros((seats, 4), dtype=np.int64),
    )
    return Lookup(rows, rules, **options)  # type: ignore[arg-type]


def ask(lookup: Lookup, seat: int, tokens: list[int], most: int = 6) -> list[int]:
    lookup._rows.token_ids[seat, : len(tokens)] = tokens
    [drafts] = lookup.propose([DraftTask(seat, len(tokens), most)])
    return drafts


def both(rules: LookupRules, **options: object) -> list[Lookup]:
    return [make(rules, plain=plain, **options) for plain in (False, True)]


TEXT = st.lists(st.integers(0, 2), max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    rules=st.sampled_from([SUFFIX, NGRAM, LookupRules(anchor=1, depth=1, most=3, factor=9.0)]),
    texts=st.lists(st.tuples(st.integers(0, 1), TEXT), max_size=6),
    asked=st.lists(st.tuples(TEXT, st.lists(st.integers(1, 9), min_size=1)), max_size=3),
    capacity=st.sampled_from([0, 64, 256]),
    most_texts=st.integers(1, 4),
)
def test_c_and_plain_agree(rules, texts, asked, capacity, most_texts) -> None:
    """Texts of three words, in a ring that they overflow; each request grows step by step."""
    native, plain = both(rules, capacity=capacity, most_texts=most_texts)
    for owner, text in texts:
        for lookup in (native, plain):
            lookup.add(np.array(text, dtype=np.int64), owner)
    for seat, (tokens, steps) in enumerate(asked):
        for lookup in (native, plain):
            lookup.admit(seat, seat % 2)
        for step in steps:
            drafts = [ask(lookup, seat, tokens, step) for lookup in (native, plain)]
            assert drafts[0] == drafts[1]
            tokens = [*tokens, *drafts[0], step % 3][: LENGTH - 1]


def longest_suffix(tokens: list[int], rules: LookupRules) -> list[int]:
    """Every place is compared."""
    for length in range(min(rules.depth, len(tokens) - 1), rules.anchor - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                drafts: list[int] = []
                while len(drafts) < min(rules.most, rules.factor * length):
                    drafts.append([*tokens, *drafts][end + len(drafts)])
                return drafts
    return []


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 4), min_size=1, max_size=24))
def test_ngram_finds_the_longest_suffix_and_of_equals_the_latest(tokens: list[int]) -> None:
    """A text so short that no occurrence is beyond the limits."""
    for lookup in both(NGRAM):
        lookup.admit(0, 0)
        assert ask(lookup, 0, tokens) == longest_suffix(tokens, NGRAM)


@pytest.mark.parametrize("plain", [False, True])
def test_continuations_vote(plain: bool) -> None:
    lookup = make(SUFFIX, plain=plain)
    lookup.admit(0, 0)
    # 1 2 3 was followed by 4 5 twice, and by 9 once, which is the latest.
    assert ask(lookup, 0, [1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5, 7, 1, 2, 3, 9, 0, 1, 2, 3])[:2] == [
        4,
        5,
    ]


@pytest.mark.parametrize("plain", [False, True])
def test_a_longer_agreement_counts_more_than_votes(plain: bool) -> None:
    lookup = make(SUFFIX, plain=plain)
    lookup.admit(0, 0)
    text = [6, 6, 1, 2, 3, 9, 9, 9, 9, 9, 9, 5, 1, 2, 3, 4, 7, 1, 2, 3, 4, 6, 6, 1, 2, 3]
    assert ask(lookup, 0, text) == [9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize("plain", [False, True])
def test_texts_of_another_owner_are_never_drafts(plain: bool) -> None:
    lookup = make(SUFFIX, plain=plain, capacity=256, most_texts=8)
    secret = np.array([1, 2, 3, 41, 42, 43], dtype=np.int64)
    mine, theirs = owner_of(Placement(tenant="a")), owner_of(Placement(tenant="b"))
    lookup.add(secret, theirs)
    lookup.admit(0, mine)
    assert ask(lookup, 0, [0, 1, 2, 3]) == []
    lookup.admit(1, theirs)
    assert ask(lookup, 1, [0, 1, 2, 3]) == [41, 42, 43]


def test_owners_differ_by_tenant_salt_and_adapter() -> None:
    placements = [
        Placement(),
        Placement(tenant="a"),
        Placement(cache_salt="a"),
        Placement(adapter="a"),
        Placement(tenant="a", cache_salt="b"),
        Placement(tenant="b", cache_salt="a"),
    ]
    assert len({owner_of(placement) for placement in placements}) == len(placements)
    assert owner_of(Placement(priority=3)) == owner_of(Placement())


@pytest.mark.parametrize("plain", [False, True])
def test_the_oldest_texts_go_first(plain: bool) -> None:
    few = make(SUFFIX, plain=plain, capacity=1024, most_texts=2)
    small = make(SUFFIX, plain=plain, capacity=16, most_texts=100)
    texts = [np.array([i, i, i, 50 + i, 60 + i], dtype=np.int64) for i in range(1, 4)]
    for lookup in (few, small):
        for text in texts:
            lookup.add(text, 0)
        found = []
        for i in range(1, 4):
            lookup.admit(0, 0)
            found.append(ask(lookup, 0, [0, i, i, i]))
        assert found == [[], [52, 62], [53, 63]], lookup is few


@pytest.mark.parametrize("plain", [False, True])
def test_a_text_longer_than_the_ring_keeps_its_end(plain: bool) -> None:
    lookup = make(SUFFIX, plain=plain, capacity=64, most_texts=2)
    lookup.add(np.arange(100, dtype=np.int64), 0)
    lookup.admit(0, 0)
    assert ask(lookup, 0, [90, 91, 92]) == [93, 94, 95, 96, 97, 98]
    lookup.admit(0, 0)
    assert ask(lookup, 0, [10, 11, 12]) == []


@pytest.mark.parametrize("plain", [False, True])
def test_an_admitted_seat_has_nothing_of_the_request_before(plain: bool) -> None:
    lookup = make(NGRAM, plain=plain)
    lookup.admit(0, 0)
    assert ask(lookup, 0, [1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    lookup.admit(0, 0)
    assert ask(lookup, 0, [8, 1, 2]) == []

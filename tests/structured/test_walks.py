"""Random texts that follow a grammar's masks are texts of the grammar."""

from __future__ import annotations

import json
import random

import jsonschema_rs
import pytest

from quire.structured.base import Grammar, TokenMatcher
from tests.structured.conftest import Kit
from tests.structured.schemas import schema

LEISURE = 60
"""Tokens after which a walk looks for the end."""
MAX_TOKENS = 3000


def as_double(digits: str) -> float:
    """1e999 is a number to JSON and to a schema, but to a reader of doubles infinity, which is none."""
    return max(-1e308, min(float(digits), 1e308))


def walk(kit: Kit, matcher: TokenMatcher, rng: random.Random) -> list[int]:
    """Random allowed tokens, until the end."""
    closing = [kit.tokenizer.encode(text, add_special_tokens=False)[0] for text in '}]"1a@.']
    ids: list[int] = []
    for step in range(MAX_TOKENS):
        allowed = kit.allowed(matcher)
        assert allowed, kit.text(ids)
        token = rng.choice(allowed)
        if not set(allowed).isdisjoint(kit.eos) and (step > LEISURE or rng.random() < 0.5):
            token = kit.eos[0]
        elif step > LEISURE and rng.random() < 0.8:
            token = next((t for t in rng.sample(closing, len(closing)) if t in allowed), token)
        assert matcher.accept(token), (kit.text(ids), token)
        ids.append(token)
        if token in kit.eos:
            return ids
    raise AssertionError(f"no end in sight: {kit.text(ids)!r}")


@pytest.mark.parametrize("compact", [False, True])
def test_200_schemas_are_kept(kit: Kit, compact: bool) -> None:
    failures = []
    for seed in range(100 * compact, 100 + 100 * compact):
        wanted = schema(seed)
        matcher = kit.matcher(json=wanted, disable_any_whitespace=compact)
        text = kit.text(walk(kit, matcher, random.Random(seed)))
        validator = jsonschema_rs.validator_for(wanted, validate_formats=True)
        if not validator.is_valid(json.loads(text, parse_float=as_double)):
            failures.append((seed, text, wanted))
        if compact:
            assert "\n" not in text
    assert not failures


def test_a_matcher_fed_the_same_tokens_gives_the_same_masks(kit: Kit) -> None:
    for seed in range(20):
        grammar = kit.compile(json=schema(seed))
        ids = walk(kit, grammar.matcher(), random.Random(seed))
        first, fed = grammar.matcher(), grammar.matcher()
        cut = len(ids) // 2
        for token in ids[:cut]:
            kit.allowed(first)  # one has been asked at every step, the other never
            assert first.accept(token) and fed.accept(token)
        for token in ids[cut:]:
            assert kit.allowed(first) == kit.allowed(fed)
            assert first.accept(token) and fed.accept(token)


def test_what_the_mask_forbids_is_not_accepted_and_changes_nothing(kit: Kit) -> None:
    rng = random.Random(0)
    matcher = kit.matcher(json=schema(3))
    ids = walk(kit, kit.matcher(json=schema(3)), random.Random(3))
    for token in ids[:-1]:
        allowed = kit.allowed(matcher)
        forbidden = set(range(kit.vocab_size)) - set(allowed)
        for wrong in rng.sample(sorted(forbidden), 5):
            assert not matcher.accept(wrong)
        assert kit.allowed(matcher) == allowed
        assert matcher.accept(token)


def texts(kit: Kit, grammar: Grammar) -> set[str]:
    """Every text of a grammar that has finitely many, by trying every mask."""
    found: set[str] = set()
    todo: list[list[int]] = [[]]
    while todo:
        ids = todo.pop()
        matcher = grammar.matcher()
        assert all(matcher.accept(token) for token in ids)
        for token in kit.allowed(matcher):
            if token in kit.eos:
                found.add(kit.text(ids))
            else:
                todo.append([*ids, token])
    return found


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"choice": ["a", "ab", "b c", "ü🙂", '"\\n'] }, {"a", "ab", "b c", "ü🙂", '"\\n'}),
        ({"regex": "(x|yy?)[0-2]"}, {f"{a}{b}" for a in ("x", "y", "yy") for b in "012"}),
        ({"regex": r"^\d{1}/$"}, {f"{digit}/" for digit in range(10)}),
        ({"grammar": 'start: "a" b?\nb: "-" ("x" | "z")'}, {"a", "a-x", "a-z"}),
        ({"grammar": 'root ::= "a" b\nb ::= [0-2] | "::"'}, {"a0", "a1", "a2", "a::"}),
        ({"json": '{"enum": [1, 12, null]}'}, {"1", "12", "null"}),
    ],
)  # fmt: skip
def test_all_texts_and_no_others(kit: Kit, params: dict[str, object], wanted: set[str]) -> None:
    assert texts(kit, kit.compile(**params)) == wanted


def test_nothing_but_the_end_may_follow_the_end(kit: Kit) -> None:
    matcher = kit.matcher(choice=["yes"])
    assert not matcher.is_finished
    assert kit.accepts(matcher, "yes")
    assert matcher.is_finished and kit.allowed(matcher) == sorted(kit.eos)
    assert matcher.accept(kit.eos[0]) and matcher.is_finished
    assert kit.allowed(matcher) == sorted(kit.eos)
    assert not matcher.accept(kit.eos[0])


def test_where_the_grammar_leaves_one_text_the_mask_leaves_the_tokenizers_tokens(kit: Kit) -> None:
    text = '{"temperature":'
    matcher = kit.matcher(
        json={"type": "object", "properties": {"temperature": {}}, "required": ["temperature"]},
        disable_any_whitespace=True,
    )
    taken = []
    while len(allowed := kit.allowed(matcher)) == 1:
        taken += allowed
        assert matcher.accept(allowed[0])
    assert text.startswith(kit.text(taken)) and len(kit.text(taken)) > 10
    assert taken == kit.tokenizer.encode(text, add_special_tokens=False)[: len(taken)]

"""What parameters mean together, decided once where a request comes in."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from quire.decoding import Decoding, GrammarSpec, Task, TokenRules
from quire.engine.input_processor import InputProcessor, check_first_token, resolve_decoding
from quire.errors import InvalidParameterError
from quire.messages import AddRequest
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.structured.base import NoTokenLeftError
from tests.server.scripted_engine import FakeModel

GRAMMAR = TokenRules(grammar=GrammarSpec("lark", 'start: "a"'))


def resolved(rules: TokenRules | None = None, *, seed: int = 0, **params: Any) -> Decoding:
    return resolve_decoding(
        SamplingParams(**params),
        task=Task.GENERATE,
        max_tokens=5,
        end_token_ids=[2, 7],
        rules=rules,
        seed=seed,
    )


def test_what_ends_a_text() -> None:
    plain = resolved(stop_token_ids=[5, 7], min_tokens=3)
    assert plain.end_token_ids == {2, 7} and plain.stop_token_ids == {5, 7}
    assert plain.final_ids == [2, 5, 7]
    assert plain.banned_until(10) == 13
    ignoring = resolved(ignore_eos=True, min_tokens=3)
    assert ignoring.final_ids == [] and ignoring.banned_until(10) == 0
    assert resolved(stop_token_ids=[5]).banned_until(10) == 0


def test_a_grammar_says_itself_when_the_text_may_end() -> None:
    decoding = resolved(GRAMMAR, ignore_eos=True, min_tokens=3)
    assert decoding.end_token_ids == {2, 7}
    assert decoding.min_tokens == 0 and decoding.banned_until(10) == 0
    assert resolved(TokenRules(bad_words=[[1]]), min_tokens=3).min_tokens == 3


EVERY = list(range(20))


@pytest.mark.parametrize(
    ("rules", "params", "named"),
    [
        (None, {"min_tokens": 1, "allowed_token_ids": [7, 2]}, ["allowed_token_ids", "min_tokens"]),
        (None, {"min_tokens": 1, "stop_token_ids": EVERY}, ["min_tokens"]),
        (None, {"min_tokens": 1, "allowed_token_ids": [7], "ignore_eos": True}, None),
        (None, {"allowed_token_ids": [7]}, None),
        (None, {"min_tokens": 1, "allowed_token_ids": [7, 8]}, None),
        (TokenRules(bad_words=[[i] for i in EVERY]), {}, ["bad_words"]),
        (TokenRules(bad_words=[[i] for i in EVERY[1:]]), {}, None),
        (TokenRules(bad_words=[[5], [6]]), {"allowed_token_ids": [5, 6]},
         ["allowed_token_ids", "bad_words"]),
        (TokenRules(bad_words=[[5, 6]]), {"allowed_token_ids": [5, 6]}, None),
        (TokenRules(bad_words=[[5]]), {"min_tokens": 1, "allowed_token_ids": [5, 2]},
         ["allowed_token_ids", "bad_words", "min_tokens"]),
        (GRAMMAR, {"min_tokens": 1, "allowed_token_ids": [2]}, None),
        (TokenRules(thinking_budget=1), {"min_tokens": 1, "allowed_token_ids": [2]}, None),
    ],
)  # fmt: skip
def test_constraints_that_leave_no_first_token_are_refused(
    rules: TokenRules | None, params: dict[str, Any], named: list[str] | None
) -> None:
    decoding = resolved(rules, **params)
    if named is None:
        check_first_token(decoding, len(EVERY))
        return
    with pytest.raises(NoTokenLeftError) as raised:
        check_first_token(decoding, len(EVERY))
    assert str(raised.value) == str(NoTokenLeftError(named))


def test_numbers_fit_where_they_are_kept() -> None:
    decoding = resolved(temperature=1.0, top_k=2**40, seed=2**64 - 5)
    assert (decoding.top_k, decoding.seed) == (2**31 - 1, -5)


def test_logprobs_of_some_tokens_alone() -> None:
    assert resolved().logprobs is None
    assert resolved(logprob_token_ids=[3]).logprobs == 0
    assert resolved(logprob_token_ids=[3], logprobs=-1).logprobs == -1


@pytest.mark.parametrize(
    ("params", "edits"),
    [
        ({}, False),
        ({"min_tokens": 2, "logprobs": 1, "temperature": 0.5}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {3: 1.0}}, True),
        ({"allowed_token_ids": [3]}, True),
    ],
)
def test_what_edits_every_logit(params: dict[str, Any], edits: bool) -> None:
    assert resolved(**params).edits_logits is edits
    assert resolved(GRAMMAR, **params).edits_logits


def test_siblings_differ_by_their_seed() -> None:
    gate = InputProcessor(FakeModel())  # type: ignore[arg-type]
    params = SamplingParams(n=3, seed=2**63 - 1, prompt_logprobs=1, max_tokens=4)
    request = gate.process([5, 6], params)
    first, *others = [message.decoding for message in request.sequences]
    assert [first.seed, *(each.seed for each in others)] == [2**63 - 1, -(2**63), 1 - 2**63]
    assert first.prompt_logprobs == 1
    for each in others:
        assert each == msgspec.structs.replace(first, seed=each.seed, prompt_logprobs=None)
    leader = request.sequences[0].request_id
    assert [m.fork_of for m in request.sequences] == [None, leader, leader]


@pytest.mark.parametrize(
    ("params", "task", "max_tokens"),
    [
        (SamplingParams(max_tokens=4), Task.GENERATE, 4),
        (SamplingParams(max_tokens=None), Task.GENERATE, 62),
        (SamplingParams(max_tokens=0, prompt_logprobs=0), Task.SCORE, 0),
    ],
)
def test_the_task_of_a_request(params: SamplingParams, task: Task, max_tokens: int) -> None:
    request = InputProcessor(FakeModel()).process([5, 6], params)  # type: ignore[arg-type]
    assert request.task is request.sequences[0].decoding.task is task
    assert request.max_tokens == request.sequences[0].decoding.max_tokens == max_tokens


def test_a_prompt_that_is_only_scored_has_one_sequence() -> None:
    with pytest.raises(InvalidParameterError, match="only scored"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)


@pytest.mark.parametrize(
    ("params", "reads"),
    [
        (PoolingParams(), True),
        (PoolingParams(pooling="mean"), False),
        (PoolingParams(skip_reading_prefix_cache=True), False),
    ],
)
def test_vectors(params: PoolingParams, reads: bool) -> None:
    gate = InputProcessor(FakeModel())  # type: ignore[arg-type]
    (message,) = gate.process([5] * 64, params).sequences
    assert message.decoding == Decoding(
        task=Task.EMBED, max_tokens=0, pooling=params, reads_prefix_cache=reads
    )


def test_a_beam_search_is_checked_and_sends_nothing_itself() -> None:
    gate = InputProcessor(FakeModel())  # type: ignore[arg-type]
    request = gate.process([5, 6], BeamSearchParams(beam_width=2))
    assert (request.sequences, request.max_tokens) == ([], 62)
    with pytest.raises(InvalidParameterError, match="context length"):
        gate.process([5, 6], BeamSearchParams(beam_width=2, max_tokens=63))


def test_placement() -> None:
    gate = InputProcessor(FakeModel())  # type: ignore[arg-type]
    here = Placement(priority=3, cache_salt="a")
    prompt = {"prompt_token_ids": [5], "cache_salt": "b"}
    for given, expected in (([5], here), (prompt, Placement(priority=3, cache_salt="b"))):
        request = gate.process(given, SamplingParams(), placement=here)
        assert request.placement == request.sequences[0].placement == expected
    for wrong, param in (
        (Placement(priority=2**40), "priority"),
        (Placement(cache_salt=""), "cache_salt"),
    ):
        with pytest.raises(InvalidParameterError) as raised:
            gate.process([5], SamplingParams(), placement=wrong)
        assert raised.value.param == param


def test_it_crosses_the_process_boundary() -> None:
    gate = InputProcessor(FakeModel())  # type: ignore[arg-type]
    params = SamplingParams(
        temperature=0.5,
        stop_token_ids=[5],
        logit_bias={3: 1.0},
        logprob_token_ids=[1],
        stop="secret",
    )
    (message,) = gate.process([5], params, placement=Placement(cache_salt="a")).sequences
    sent = msgspec.msgpack.encode(message)
    assert b"secret" not in sent
    assert msgspec.msgpack.decode(sent, type=AddRequest) == message

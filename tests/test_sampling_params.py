"""Every rule of every field, one row each."""

from __future__ import annotations

import math

import msgspec
import pytest

from quire.errors import InvalidParameterError
from quire.sampling_params import SamplingParams

BAD = [
    ("n", 0), ("n", -1), ("n", 16385), ("n", 1.5), ("n", True), ("n", "2"), ("n", None),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", 3),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
    ("temperature", -1), ("temperature", 2.01), ("temperature", math.nan), ("temperature", "hot"),
    ("temperature", None), ("top_p", 0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -2),
    ("top_k", 1.0), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**63), ("seed", "x"),
    ("stop", [""]), ("stop", ["a", 3]), ("stop", ["x"] * 257), ("stop", "y" * 4097),
    ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", 5),
    ("stop_token_ids", [1] * 1025), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 1.5),
    ("min_tokens", -1), ("min_tokens", 17), ("logprobs", -2), ("logprobs", 1.5),
    ("ignore_eos", 1), ("detokenize", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: repr(v)[:20])
def test_a_broken_rule_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field
    assert str(raised.value).startswith(field)
    assert isinstance(raised.value, ValueError)
    assert len(str(raised.value)) < 250


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.stop) == (16, 0, None, None)


def test_neutral_spellings_are_one() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(top_k=-1) == SamplingParams()
    assert SamplingParams(stop="a") == SamplingParams(stop=["a"])
    assert SamplingParams(stop=[]) == SamplingParams()


def test_tiny_temperatures() -> None:
    greedy = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1)
    assert greedy == SamplingParams(temperature=0.0) and greedy.is_greedy
    assert SamplingParams(temperature=0.005).temperature == 0.01
    with pytest.raises(InvalidParameterError, match="greedy"):
        SamplingParams(temperature=0.0, n=2)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidParameterError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(best_of=3)  # type: ignore[call-arg]


def test_the_wire_keeps_everything() -> None:
    params = SamplingParams(n=2, temperature=0.5, stop=["a", "b"], seed=9, logprobs=3)
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params
    assert len(msgspec.msgpack.encode(SamplingParams())) < 8  # defaults do not travel


def test_replace_checks_again() -> None:
    with pytest.raises(InvalidParameterError):
        SamplingParams().replace(top_p=3.0)

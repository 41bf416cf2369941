"""`--speculative-config`, its shorthands, and what they mean together."""

from __future__ import annotations

import pytest

from quire.config import Speculation, from_flat
from quire.config.speculative import DEFAULT_TOKENS, IDLE_KEYS, NOT_HERE, REFUSED_KEYS
from quire.errors import ConfigError


def speculation(**options: object) -> Speculation | None:
    return from_flat(options).speculative.speculation


def of(**keys: object) -> Speculation:
    found = speculation(speculative_config=keys)
    assert found is not None
    return found


def refusal(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        from_flat(options)
    return str(caught.value)


def test_it_is_off_by_default() -> None:
    assert speculation() is None
    assert speculation(speculative_config={}) is None
    assert from_flat({}).max_drafts == 0


@pytest.mark.parametrize("method", DEFAULT_TOKENS)
def test_every_method_has_a_default_number(method: str) -> None:
    found = of(method=method)
    assert (found.method, found.num_speculative_tokens) == (method, DEFAULT_TOKENS[method])
    options = {"speculative_config": {"method": method, "num_speculative_tokens": 2}}
    assert from_flat(options).max_drafts == 2


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("ngram", "ngram"),
        ("[ngram]", "ngram"),
        ("suffix", "suffix"),
        ("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "eagle3"),
        ("yuhuili/EAGLE-LLaMA3-Instruct-8B", "eagle"),
        ("Qwen/Qwen3-0.6B", "draft_model"),
    ],
)
def test_the_method_follows_from_the_model(model: str, method: str) -> None:
    assert of(model=model).method == method
    assert speculation(speculative_model=model, num_speculative_tokens=3).method == method


def test_a_family_had_its_own_mtp() -> None:
    assert of(method="deepseek_mtp").method == "mtp"


def test_shorthands_are_keys() -> None:
    expected = of(method="draft_model", model="d", num_speculative_tokens=3)
    assert speculation(spec_method="draft_model", spec_model="d", spec_tokens=3) == expected
    assert speculation(speculative_config={"model": "d"}, spec_tokens=3) == expected
    assert speculation(speculative_model="d", num_speculative_tokens=3) == expected
    found = speculation(speculative_model="[ngram]", ngram_prompt_lookup_max=4)
    assert found == of(method="ngram", prompt_lookup_max=4)


def test_the_same_twice_is_an_error() -> None:
    message = refusal(speculative_config={"method": "ngram"}, spec_method="suffix")
    assert "spec_method" in message and "leave one out" in message
    assert "two names" in refusal(spec_model="a", speculative_model="b")


def test_one_length_of_a_lookup_means_both() -> None:
    found = of(method="ngram", prompt_lookup_max=4)
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == (4, 4)
    assert "prompt_lookup_min 5" in refusal(
        speculative_config={"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}
    )


@pytest.mark.parametrize("key", IDLE_KEYS)
def test_keys_that_only_tune_are_accepted(key: str) -> None:
    assert of(method="ngram", **{key: True}) == of(method="ngram")


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_that_ask_for_something_else_are_refused_with_the_reason(key: str) -> None:
    accepted, why = REFUSED_KEYS[key]
    assert why in refusal(speculative_config={"method": "ngram", key: "other"})
    for value in (None, *accepted):
        assert of(method="ngram", **{key: value}) == of(method="ngram")


def test_one_is_not_true() -> None:
    assert "draft_tensor_parallel_size" in refusal(
        speculative_config={"method": "ngram", "draft_tensor_parallel_size": True}
    )


@pytest.mark.parametrize("method", [*NOT_HERE, "ngam"])
def test_other_methods_are_refused(method: str) -> None:
    message = refusal(speculative_config={"method": method})
    assert method in message and (NOT_HERE.get(method) or "methods are ngram") in message


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"methd": "ngram"}, "Did you mean method?"),
        ({"method": "ngram", "xyz": 1}, "Keys are"),
        ({"num_speculative_tokens": 3}, "needs a method"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "at least 1"),
        ({"method": "ngram", "num_speculative_tokens": 65}, "at most 64"),
        ({"method": "ngram", "num_speculative_tokens": "3"}, "an integer"),
        ({"method": "ngram", "num_speculative_tokens": True}, "an integer"),
        ({"method": "ngram", "prompt_lookup_min": 0}, "at least 1"),
        ({"method": "draft_model", "model": ""}, "a string"),
        ({"method": "draft_model", "draft_sample_method": "best"}, "greedy or probabilistic"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, "in [0, 1]"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": float("nan")}, "in [0, 1]"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": 0}, "above 0"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": float("nan")}, "above 0"),
    ],
)
def test_mistakes_are_named(keys: dict[str, object], part: str) -> None:
    assert part in refusal(speculative_config=keys)


def test_vllms_example_works() -> None:
    found = of(
        method="suffix",
        num_speculative_tokens=8,
        suffix_decoding_max_tree_depth=24,
        suffix_decoding_max_cached_requests=10000,
        suffix_decoding_max_spec_factor=1,
        suffix_decoding_min_token_prob=0.1,
        disable_padded_drafter_batch=False,
    )
    assert found.suffix_decoding_max_spec_factor == 1.0

"""`retain_seconds` of a prompt, on the built-in model."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams
from quire.errors import InvalidParameterError

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(num_gpu_blocks_override=60, max_model_len=512) as found:
        yield found


def cached(llm: LLM, prompt: object) -> int:
    (output,) = llm.generate([prompt], PARAMS, use_tqdm=False)
    return output.num_cached_tokens


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_prompt_that_is_retained_is_found_after_a_flood(llm: LLM, seconds: float | None) -> None:
    llm.reset_prefix_cache()
    ids = [7 + (number * 31) % 400 for number in range(200)]
    prompt: dict[str, object] = {"prompt_token_ids": ids}
    assert cached(llm, prompt if seconds is None else prompt | {"retain_seconds": seconds}) == 0
    for number in range(12):
        cached(llm, [500 + number] * 150)
    assert cached(llm, prompt) == (0 if seconds is None else 192)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), True, "60", 1e9])
def test_a_wrong_number_of_seconds_is_refused(llm: LLM, seconds: object) -> None:
    with pytest.raises(InvalidParameterError, match="retain_seconds must be a number above 0"):
        llm.generate([{"prompt": "a", "retain_seconds": seconds}], PARAMS)

"""--swap-space from end to end. What it computes is proved elsewhere; here, that it is used and says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from quire import LLM, SamplingParams

OPTIONS = {
    "max_model_len": 256,
    "num_gpu_blocks_override": 20,
    "max_num_seqs": 2,
    "disable_log_stats": False,
    "swap_space": 0.01,
}
PROMPTS = [list(range(first, first + 200)) for first in (10, 1010, 2010)]
"""Two of them do not fit in the cache together. Each has 12 full blocks."""
GREEDY = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def llm(loads_pay: None) -> Iterator[LLM]:
    with LLM(**OPTIONS) as made:
        yield made


def run(llm: LLM, prompt: list[int]) -> tuple[int, list[int]]:
    """The prompt's cached tokens, and the generated ones."""
    (output,) = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
    return output.num_cached_tokens or 0, list(output.outputs[0].token_ids)


def ram(llm: LLM, name: str) -> float:
    """A metric, as of the last step."""
    values = [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == f"quire:kv_tier_{name}" and metric.labels["tier"] == "ram"
    ]
    assert len(values) == 1
    return values[0]


def eventually(is_so: Callable[[], bool]) -> None:
    """Saves are made beside the steps."""
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def in_tier(llm: LLM) -> int:
    store = llm._core._core.executor.store  # type: ignore[union-attr]
    return len(store.tiers[0])


def staged(llm: LLM) -> int:
    store = llm._core._core.executor.store  # type: ignore[union-attr]
    return len(store._staging)


def test_what_the_cache_dropped_is_loaded_and_counted(llm: LLM) -> None:
    first = [run(llm, prompt) for prompt in PROMPTS]
    assert [cached for cached, _ in first] == [0, 0, 0]
    eventually(lambda: in_tier(llm) >= 18)
    again = []
    for prompt in PROMPTS:
        eventually(lambda: not staged(llm))  # else it is loaded from there
        again.append(run(llm, prompt))
    assert again == [(192, tokens) for _, tokens in first]
    assert ram(llm, "loaded_blocks") >= 24
    found = {
        metric.labels["source"]: metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:prompt_tokens_cached_by_source"
    }
    assert found == {"device": 0, "host": 3 * 192, "disk": 0, "p2p": 0}
    assert ram(llm, "saved_blocks") >= 24 and ram(llm, "off") == 0
    assert 0 < ram(llm, "bytes") <= ram(llm, "capacity_bytes") == int(0.01 * 2**30)
    assert ram(llm, "blocks") == in_tier(llm)


def test_a_reset_of_the_cache_and_sleep_empty_the_tier(llm: LLM) -> None:
    for empty in (llm.reset_prefix_cache, lambda: (llm.sleep(1), llm.wake_up())):
        expected = [run(llm, prompt)[1] for prompt in PROMPTS]
        eventually(lambda: in_tier(llm) >= 18)
        empty()
        assert [run(llm, prompt) for prompt in PROMPTS] == [(0, tokens) for tokens in expected]


@pytest.mark.parametrize(
    ("policy", "times", "saved"),
    [
        ("write_through", 1, 12),
        ("write_through_selective", 1, 0),
        ("write_through_selective", 2, 12),
    ],
)
def test_blocks_are_saved_before_the_cache_drops_them(policy: str, times: int, saved: int) -> None:
    with LLM(**OPTIONS, kv_write_policy=policy) as llm:
        for _ in range(times):
            run(llm, PROMPTS[0])
        run(llm, PROMPTS[1][:20])  # a save goes with the next plan
        run(llm, PROMPTS[1][:15])
        short = {"write_through": 1, "write_through_selective": 0}[policy]
        eventually(lambda: in_tier(llm) >= saved + short)
        assert in_tier(llm) == saved + short

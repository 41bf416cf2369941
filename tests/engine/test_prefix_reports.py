"""`RequestOutput.prefix` with stores outside the cache, on the built-in model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from quire import LLM, SamplingParams
from quire.prefix_report import MissReason, PrefixReport

OPTIONS = {
    "max_model_len": 256,
    "num_gpu_blocks_override": 20,
    "max_num_seqs": 2,
    "disable_log_stats": False,
}
PROMPTS = [list(range(first, first + 200)) for first in (10, 1010, 2010)]
"""Two of them do not fit in the cache together. Each has 12 full blocks."""


def ask(llm: LLM, prompt: list[int]) -> PrefixReport:
    params = SamplingParams(max_tokens=2, temperature=0.0)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    report = output.prefix
    assert report is not None and output.num_cached_tokens == report.cached
    assert report.cached + report.computed == len(prompt)
    return report


def counted(llm: LLM, name: str, **labels: str) -> float:
    (value,) = [
        metric.value  # type: ignore[union-attr]
        for metric in llm.get_metrics()
        if metric.name == name and labels.items() <= metric.labels.items()
    ]
    return value


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_without_a_store_it_was_evicted_and_nothing_external_is_counted() -> None:
    with LLM(**OPTIONS) as llm:
        for prompt in PROMPTS:
            assert ask(llm, prompt).reason is MissReason.UNSEEN
        report = ask(llm, PROMPTS[0])
        assert report.reason is MissReason.EVICTED and report.external == 0
        assert report.seconds_ago > 0 and report.since_step > 0
        assert counted(llm, "vllm:external_prefix_cache_queries") == 0
        assert counted(llm, "quire:prefix_miss", reason="evicted") == 1
        assert counted(llm, "quire:prefix_miss_tokens", reason="evicted") == report.computed


def test_host_memory_then_a_disk_in_the_next_life(tmp_path: Path) -> None:
    options = OPTIONS | {"kv_disk_path": str(tmp_path / "kv"), "kv_write_policy": "write_through"}
    with LLM(**options, swap_space=0.01) as llm:
        for prompt in PROMPTS:
            ask(llm, prompt)
        store = llm._core._core.executor.store  # type: ignore[union-attr]
        eventually(lambda: all(len(tier) >= 24 for tier in store.tiers))
        report = ask(llm, PROMPTS[0])
        assert report.reason is MissReason.BOUNDARY and report.disk == 0
        assert report.device + report.ram == 192 and report.ram > 0
        assert counted(llm, "vllm:external_prefix_cache_hits") == report.ram
        assert (
            counted(llm, "vllm:prompt_tokens_by_source", source="external_kv_transfer")
            == report.ram
        )
    with LLM(**options) as llm:
        report = ask(llm, PROMPTS[1])
        assert (report.disk, report.reason) == (192, MissReason.BOUNDARY)
        assert counted(llm, "vllm:prompt_tokens_cached_by_source", source="disk") == 192
        assert counted(llm, "vllm:prefix_cache_hits") == 0
        assert llm.reset_prefix_cache()
        assert ask(llm, PROMPTS[1]).reason is MissReason.RESET

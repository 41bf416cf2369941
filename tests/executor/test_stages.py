"""Stages of a pipeline answer as one device does, with every feature; plans overlap."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.engine.llm import LLM
from quire.errors import ConfigError, EngineDeadError, WorkerError
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_compose import said
from tests.engine.test_exactness import make_llm
from tests.executor.test_workers import (
    GREEDY,
    OPTIONS,
    executor_of,
    test_any_mix_of_parameters_gives_the_answers_of_one_device,
    test_sleep_and_wake,
    test_vectors_are_those_of_one_device,
)

Servable = Callable[[str], ServableCheckpoint]
ON_EVERY_LAYOUT = (
    test_any_mix_of_parameters_gives_the_answers_of_one_device,
    test_sleep_and_wake,
    test_vectors_are_those_of_one_device,
)
"""Collected here too, and run with this file's engines."""
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "two stages": ("qwen3", {"pipeline_parallel_size": 2}),
    "three stages, windows": ("gemma3", {"pipeline_parallel_size": 3}),
    "two stages of two": ("qwen3", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def engines(request: pytest.FixtureRequest, servable: Servable) -> Iterator[tuple[LLM, LLM]]:
    """One device, and the stages."""
    name, sizes = LAYOUTS[request.param]
    checkpoint = servable(name)
    with make_llm(checkpoint, **OPTIONS) as one, make_llm(checkpoint, **sizes, **OPTIONS) as many:
        yield one, many


def test_plans_are_in_flight_in_all_stages(
    engines: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = engines
    core, executor = many._core._core, executor_of(many)
    execute, most = executor.execute, 0

    def counted(plan: Any) -> Any:
        nonlocal most
        most = max(most, 1 + len(core._in_flight))
        return execute(plan)

    monkeypatch.setattr(executor, "execute", counted)
    batch = prompts(9, seed=1)
    found = many.generate(batch, GREEDY, use_tqdm=False)
    assert most == executor.max_in_flight > 1
    assert [said(each) for each in found] == [
        said(each) for each in one.generate(batch, GREEDY, use_tqdm=False)
    ]


def test_the_ledger_has_each_stage(engines: tuple[LLM, LLM]) -> None:
    one, many = (dict(engine.ready.ledger) for engine in engines)
    assert one["KV blocks"] == many["KV blocks"] and "rank 0" in many


def test_drafts_change_nothing(servable: Servable) -> None:
    batch = [[1, 2, 3] * 12, [7, 8] * 9, [5] * 20]
    found = []
    for size in (1, 2):
        options = {
            **OPTIONS,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        }
        with make_llm(servable("qwen3"), pipeline_parallel_size=size, **options) as llm:
            found.append([said(each) for each in llm.generate(batch, GREEDY, use_tqdm=False)])
    assert found[0] == found[1]


def test_a_stage_that_is_killed_is_named(servable: Servable) -> None:
    with make_llm(servable("qwen3"), pipeline_parallel_size=2, **OPTIONS) as llm:
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
        [rank] = executor_of(llm)._others.ranks
        os.kill(rank.process.pid, signal.SIGKILL)
        with pytest.raises((WorkerError, EngineDeadError), match=r"ank 0.*killed by SIGKILL"):
            llm.generate(prompts(4, seed=1), GREEDY, use_tqdm=False)


def test_what_stages_do_not_do_is_refused(servable: Servable) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size above 1 .* kv_cache_dtype fp8"):
        make_llm(servable("gemma3"), pipeline_parallel_size=2, kv_cache_dtype="fp8", **OPTIONS)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size is 9, but Qwen3"):
        make_llm(servable("qwen3"), pipeline_parallel_size=9, **OPTIONS)

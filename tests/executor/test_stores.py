"""With KV outside the cache, in memory, on disk or both, every layout gives the logits of an endless cache on
one device, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.engine.llm import LLM
from quire.errors import WorkerError
from quire.lora.request import LoRARequest
from quire.messages import AbortRequests
from quire.models.registry import resolve_spec
from quire.scheduler.invariants import check_invariants
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_exactness import (
    GREEDY,
    SCHEDULES,
    Recorder,
    assert_same_bits,
    make_llm,
    tokens_of,
)
from tests.scheduler.requests import add_request
from tests.weights.adapter_writer import write_adapter

pytestmark = pytest.mark.usefixtures("loads_pay")
Servable = Callable[[str], ServableCheckpoint]
SHORT = GREEDY.replace(max_tokens=24)
RAM = {"swap_space": 0.05}
BATCH = prompts(16)
ROUNDS = 3
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gemma3", {}),  # windows, and groups of different numbers of layers
    ("llama", {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}),
    ("llama", {"quantization": "int8"}),
    ("llama", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}),
    ("qwen2", {"tensor_parallel_size": 2, "dtype": "bfloat16"}),
    ("gemma3", {"pipeline_parallel_size": 3}),  # a stage has layers of one group only
    ("llama-mha-tied", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
]
SAME = ("dtype", "kv_cache_dtype", "quantization")
"""Options that change the logits."""


def store_of(llm: LLM) -> Any:
    return llm._core._core.executor.store


def loaded(llm: LLM) -> int:
    counts = store_of(llm).counts
    return sum(count for key, count in counts.items() if key.startswith("loaded"))


def options_of(stores: str, directory: Path) -> dict[str, Any]:
    disk = {"kv_disk_path": str(directory), "kv_disk_size": 0.05}
    return {"ram": RAM, "disk": disk, "both": {**RAM, **disk}}[stores]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_gives_the_logits_of_an_endless_cache(
    name: str, layout: dict[str, Any], servable: Servable, tmp_path: Path
) -> None:
    checkpoint = servable(name)
    with make_llm(checkpoint, **{key: layout[key] for key in SAME if key in layout}) as llm:
        recorder = Recorder(llm)
        expected = tokens_of(llm.generate(BATCH, SHORT, use_tqdm=False))
    stores = "both" if layout.get("tensor_parallel_size") else "ram"
    options = {**SCHEDULES["tiny pool"], **layout, **options_of(stores, tmp_path)}
    with make_llm(checkpoint, worker_timeout=30.0, **options) as llm:
        stored = Recorder(llm)
        for _ in range(ROUNDS):
            stored.logits = {}
            outputs = llm.generate(BATCH, SHORT, use_tqdm=False)
            assert tokens_of(outputs) == expected
            if "speculative_config" not in layout:
                assert_same_bits(stored.logits, recorder.logits)
        found = sum(output.num_cached_tokens for output in outputs)
        assert loaded(llm) > 50 and found > 0.6 * sum(map(len, BATCH))


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_disk_holds_is_found_after_a_restart(
    size: int, servable: Servable, tmp_path: Path
) -> None:
    checkpoint, found = servable("qwen2"), []
    options = {**options_of("disk", tmp_path), "tensor_parallel_size": size}
    expected = sum(min(len(each) // 16 * 16, len(each) - 1) for each in BATCH)
    while len(found) < 2 or (found[-1][1] < expected and len(found) < 9):
        with make_llm(checkpoint, kv_write_policy="write_through", **options) as llm:
            store_of(llm).tiers[0].wait_indexed()  # of another rank nobody knows: try again
            outputs = llm.generate(BATCH, SHORT, use_tqdm=False)
            found.append((tokens_of(outputs), sum(each.num_cached_tokens for each in outputs)))
    assert all(tokens == found[0][0] for tokens, _ in found)
    assert found[0][1] == 0 and found[-1][1] == expected and (size > 1 or len(found) == 2)


def test_a_reset_reaches_the_stores_of_all_ranks(servable: Servable, tmp_path: Path) -> None:
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    options = {**SCHEDULES["tiny pool"], **layout, **options_of("both", tmp_path)}
    with make_llm(servable("llama-mha-tied"), **options) as llm:
        llm.generate(BATCH, SHORT, use_tqdm=False)
        names = list(store_of(llm).tiers[0]._entries)
        assert names
        llm.reset_prefix_cache()
        outputs = llm.generate(BATCH, SHORT, use_tqdm=False)
        assert sum(output.num_cached_tokens for output in outputs) == 0


def test_adapters_and_a_draft_model(servable: Servable, tmp_path: Path) -> None:
    """KV is an adapter's own; a draft model has none for what is loaded, and a token never depends on it."""
    lora = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 8}
    checkpoint, found = servable("llama"), []
    spec = resolve_spec(json.loads((checkpoint.directory / "config.json").read_text()))
    requests = [None]
    for number in range(2):
        path = write_adapter(tmp_path / f"a{number}", spec, ["_proj"], seed=number)
        requests.append(LoRARequest(f"a{number}", number + 1, str(path)))
    which = [requests[number % 3] for number in range(len(BATCH))]
    draft = {"method": "draft_model", "model": str(checkpoint.directory)}
    for stores in ({}, {**SCHEDULES["tiny pool"], **RAM, "speculative_config": draft}):
        with make_llm(checkpoint, **lora, **stores) as llm:
            for _ in range(2):
                outputs = llm.generate(BATCH, SHORT, lora_request=which, use_tqdm=False)
                found.append(tokens_of(outputs))
            assert not stores or loaded(llm) > 20
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel_size": 2}])
def test_aborts_at_any_moment_leave_nothing(layout: dict[str, Any], servable: Servable) -> None:
    rng = random.Random(3)
    options = {**SCHEDULES["tiny pool"], **RAM, **layout}
    with make_llm(servable("mistral-window"), **options) as llm:
        expected = tokens_of(llm.generate(BATCH, SHORT, use_tqdm=False))
        core, waits = llm._core._core, 0
        for start in range(1000, 1200, 20):
            ids = list(range(start, start + len(BATCH)))
            for request_id, prompt in zip(ids, BATCH, strict=True):
                core.handle(add_request(request_id, prompt, max_tokens=24))
            while ids and core.has_work:
                core.step()
                waits += core.scheduler.loading.is_under_way
                check_invariants(core.scheduler)
                if rng.random() < 0.3:
                    core.handle(AbortRequests([ids.pop(rng.randrange(len(ids)))]))
            core.handle(AbortRequests(ids))
            while core.has_work:
                core.step()
            assert core.scheduler.kv.num_free == core.scheduler.kv.num_usable
        assert waits > 10 and not store_of(llm).is_loading
        assert tokens_of(llm.generate(BATCH, SHORT, use_tqdm=False)) == expected


@pytest.mark.parametrize("end", ["killed by SIGKILL", "late by 0.5 s with a load of KV"])
def test_a_rank_that_ends_or_hangs_while_it_loads_is_named(end: str, servable: Servable) -> None:
    options = {**RAM, "tensor_parallel_size": 2, "worker_timeout": 30.0}
    with make_llm(servable("qwen2"), num_gpu_blocks_override=20, **options) as llm:
        llm.generate(BATCH, SHORT, use_tqdm=False)
        core = llm._core._core
        if "late" in end:
            core.executor._loads._timeout = 0.5
        [rank] = core.executor._others.ranks
        os.kill(rank.process.pid, signal.SIGSTOP)
        prompt = next(each for each in BATCH if len(each) > 64)
        core.handle(add_request(999, prompt, max_tokens=4))
        with pytest.raises(WorkerError, match=rf"ank 1 \(pid {rank.process.pid}\) .*{end}"):
            for step in range(10_000):
                core.step()
                if step == 3:
                    assert core.scheduler.loading.is_under_way
                    if "SIGKILL" in end:
                        os.kill(rank.process.pid, signal.SIGKILL)
    assert not [each for each in threading.enumerate() if each.name.startswith("kv ")]

"""Several ranks answer as one device does, with every feature, and have the scheduler's block tables."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from quire.config import from_flat
from quire.engine import assemble
from quire.engine.assemble import _check_ranks
from quire.engine.llm import LLM
from quire.errors import ConfigError, MemoryFitError
from quire.executor.adapters import AdapterEnd, PlanOrder, RankAdapters
from quire.executor.workers import WorkersExecutor
from quire.lora.request import LoRARequest
from quire.messages import DropAdapter, StepOutputs
from quire.messages.worker import AdapterEnded
from quire.runner.following import digest_of
from quire.sampling_params import PoolingParams, SamplingParams
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_compose import REQUESTS, said
from tests.engine.test_exactness import make_llm
from tests.weights.adapter_writer import write_adapter

Servable = Callable[[str], ServableCheckpoint]
OPTIONS: dict[str, Any] = {
    "max_logprobs": -1,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 60,
    "worker_timeout": 30.0,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def executor_of(llm: LLM) -> WorkersExecutor:
    executor = llm._core._core.executor
    assert isinstance(executor, WorkersExecutor)
    return executor


@pytest.fixture(scope="module", params=["qwen3", "mistral-window"])
def engines(request: pytest.FixtureRequest, servable: Servable) -> Iterator[tuple[LLM, LLM]]:
    """One device, and two ranks."""
    checkpoint = servable(request.param)
    with (
        make_llm(checkpoint, **OPTIONS) as one,
        make_llm(checkpoint, tensor_parallel_size=2, **OPTIONS) as two,
    ):
        yield one, two


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(REQUESTS)
def test_any_mix_of_parameters_gives_the_answers_of_one_device(
    engines: tuple[LLM, LLM], requests: list[tuple[int, SamplingParams]]
) -> None:
    texts = prompts(6, seed=3)
    batch = [texts[index] for index, _ in requests]
    answers = [
        engine.generate(batch, [params for _, params in requests], use_tqdm=False)
        for engine in engines
    ]
    for one, two in zip(*answers, strict=True):
        assert said(one) == said(two)


def test_vectors_are_those_of_one_device(engines: tuple[LLM, LLM]) -> None:
    for pooling in ("last", "mean"):
        params = PoolingParams(pooling=pooling)
        vectors = [
            [
                each.outputs.embedding
                for each in llm.embed(prompts(5, seed=8), pooling_params=params, use_tqdm=False)
            ]
            for llm in engines
        ]
        assert vectors[0] == vectors[1]


def test_every_rank_has_the_schedulers_tables(
    engines: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step, with the tokens whose KV exists."""
    core = engines[1]._core._core
    executor, step, compared = executor_of(engines[1]), core.step, 0

    def compare() -> StepOutputs:
        nonlocal compared
        outputs: StepOutputs = step()
        known, tables, kv = {}, [], core.scheduler.kv
        for request in sorted(core.scheduler.running, key=lambda each: each.request_id):
            count = known[request.request_id] = request.num_computed_tokens
            groups = range(len(executor._spec.model.kv.groups))
            blocks = [list(kv.block_ids(request.request_id, group)) for group in groups]
            tables.append((request.request_id, request.token_ids[:count], blocks))
        if known:
            digests = executor.table_digests(known)
            assert len(set(digests)) == 1
            if not kv.has_windows:  # what is behind one the scheduler has given back
                assert digests[0] == digest_of(tables)
            compared += 1
        return outputs

    monkeypatch.setattr(core, "step", compare)
    engines[1].generate(prompts(12, seed=5), GREEDY, use_tqdm=False)
    assert compared > 10


def test_sleep_and_wake(engines: tuple[LLM, LLM]) -> None:
    batch = prompts(4, seed=2)
    expected = [said(each) for each in engines[0].generate(batch, GREEDY, use_tqdm=False)]
    for level in (1, 2):
        engines[1].sleep(level)
        engines[1].wake_up()
        found = engines[1].generate(batch, GREEDY, use_tqdm=False)
        assert [said(each) for each in found] == expected


def test_all_sleep_on_if_one_cannot_wake_up(
    engines: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines[1]
    executor = executor_of(llm)
    expected = said(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0])

    def fails(num_blocks: int) -> None:
        raise MemoryFitError("others took it")

    llm.sleep(1)
    with monkeypatch.context() as patched:
        patched.setattr(executor._worker.platform, "cache", fails)
        with pytest.raises(MemoryFitError, match="others took it"):
            llm.wake_up()
    llm.wake_up()
    assert said(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]) == expected


def test_a_line_of_the_ledger_for_each_rank_that_differs(engines: tuple[LLM, LLM]) -> None:
    one, two = (dict(engine.ready.ledger) for engine in engines)
    assert "rank 0" not in one and one["KV blocks"] == two["KV blocks"]
    assert one["KV cache"] == two["KV cache"], "each rank has half of the heads"


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_drafts_change_nothing(servable: Servable, method: str) -> None:
    batch = [[1, 2, 3] * 12, [7, 8] * 9, [5] * 20]
    found = []
    for size in (1, 2):
        options = {**OPTIONS, "speculative_config": {"method": method, "num_speculative_tokens": 3}}
        with make_llm(servable("qwen3"), tensor_parallel_size=size, **options) as llm:
            found.append([said(each) for each in llm.generate(batch, GREEDY, use_tqdm=False)])
    assert found[0] == found[1]


def test_adapters_are_loaded_on_every_rank(tmp_path: Path) -> None:
    options = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_model_len": 256}
    params, found = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), []
    for size in (1, 2):
        with LLM(tensor_parallel_size=size, kv_cache_memory_bytes=1 << 24, **options) as llm:
            spec = llm.model.spec
            adapters = [LoRARequest(f"a{i}", i + 1, str(tmp_path / f"a{i}")) for i in range(4)]
            if size == 1:
                for i, each in enumerate(adapters):
                    write_adapter(Path(each.lora_path), spec, ["_proj"], seed=i)
            prompts = ["What does os.path.join do?"] * 5
            for _ in range(2):
                outputs = llm.generate(
                    prompts, params, lora_request=[None, *adapters], use_tqdm=False
                )
                found.append([output.outputs[0].token_ids for output in outputs])
                llm.sleep(1)  # which drops them
                llm.wake_up()
    assert all(each == found[0] for each in found)
    assert len({tuple(ids) for ids in found[0]}) == 5


def test_an_adapter_that_one_rank_cannot_load() -> None:
    own, sent, said = FakeTable(), [], deque([(1, AdapterEnded("b", "it is broken"))])
    others: Any = SimpleNamespace(
        send=sent.append, watch=SimpleNamespace(adapters=said), ranks=[SimpleNamespace(number=1)]
    )
    store = RankAdapters(own, others, PlanOrder())  # type: ignore[arg-type]
    store.load("a", Path("/a"))
    store.load("b", Path("/b"))
    assert store.poll() == [AdapterEnd("b", "it is broken")]
    assert own.dropped == ["b"] and sent[-1] == DropAdapter("b")
    said.append((1, AdapterEnded("a")))
    assert store.poll() == [AdapterEnd("a", None)] and store.poll() == []


class FakeTable:
    """Loads at once."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self._loaded: list[AdapterEnd] = []

    def load(self, key: str, path: Path) -> None:
        self._loaded.append(AdapterEnd(key, None))

    def poll(self) -> list[AdapterEnd]:
        loaded, self._loaded = self._loaded, []
        return loaded

    def drop(self, key: str) -> None:
        self.dropped.append(key)


def test_each_rank_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "gpu_count", lambda: 1)
    resolved: Any = SimpleNamespace(draft=None, device="cuda")
    with pytest.raises(ConfigError, match=r"4 ranks .* need a GPU each, and there are 1"):
        _check_ranks(from_flat({"tensor_parallel_size": 4}), resolved)


def test_a_closed_engine_leaves_nothing(servable: Servable) -> None:
    with make_llm(servable("llama"), **OPTIONS) as llm:  # what is opened once and stays
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    before = sorted(os.listdir("/proc/self/fd"))
    with make_llm(servable("llama"), tensor_parallel_size=2, **OPTIONS) as llm:
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
        processes = [rank.process for rank in executor_of(llm)._others.ranks]
    assert [process.returncode for process in processes] == [0]
    assert len(os.listdir("/proc/self/fd")) == len(before)
    llm.close()

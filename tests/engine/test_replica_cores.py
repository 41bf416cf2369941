"""Several engine cores in processes of their own: the tokens of one, whatever happens to the others."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from quire.config import from_flat
from quire.engine import gpu, replica_cores
from quire.engine.async_llm import AsyncLLM
from quire.engine.core_client import CoreProcess
from quire.engine.llm import LLM
from quire.engine.replica_cores import ReplicaCores, _environments, start_cores
from quire.engine.stream import RequestStream
from quire.errors import ConfigError, EngineDeadError, EngineError
from quire.lora.request import LoRARequest
from quire.outputs import RequestOutput
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    RequestOutputKind,
    SamplingParams,
)
from quire.util.cores import pinned, shares
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.weights.adapter_writer import write_adapter

pytestmark = pytest.mark.timeout(240)

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "num_gpu_blocks_override": 100,
    "max_core_deaths": 1,
}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True, logprobs=1)
PROMPTS = prompts(16, longest=100)


@pytest.fixture(scope="module")
def one(servable: Callable[[str], ServableCheckpoint]) -> Iterator[LLM]:
    """The engine that the others have to agree with."""
    with LLM(str(servable("llama").directory), **OPTIONS, **LORA) as llm:
        yield llm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(servable: Callable[[str], ServableCheckpoint]) -> AsyncIterator[AsyncLLM]:
    engine = await start(servable, 2, **LORA)
    yield engine
    await engine.shutdown()


async def start(
    servable: Callable[[str], ServableCheckpoint], count: int, **options: object
) -> AsyncLLM:
    model = str(servable("llama").directory)
    config = from_flat({"model": model, "data_parallel_size": count, **OPTIONS, **options})
    return await AsyncLLM.start(config)


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def final(stream: RequestStream) -> RequestOutput:
    return (await collect(stream))[-1]


def ids(output: RequestOutput) -> list[list[int]]:
    return [list(sequence.token_ids) for sequence in output.outputs]


def cores(engine: AsyncLLM) -> list[CoreProcess]:
    assert isinstance(engine._core, ReplicaCores)
    return engine._core._cores


@pytest.mark.asyncio(loop_scope="module")
async def test_the_tokens_of_one(one: LLM, two: AsyncLLM, tmp_path: Path) -> None:
    """Of every kind of request; twice, so that both replicas compute some of each."""
    adapter = str(write_adapter(tmp_path / "a", one.model.spec, ["_proj"], seed=1))
    request = LoRARequest("a", 1, adapter)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    greedy, sampled = one.generate(prompts, GREEDY), one.generate(prompts, SAMPLED)
    adapted = one.generate(prompts, GREEDY, lora_request=request)
    vectors = one.embed(prompts)
    beams = one.beam_search(prompts[:4], BeamSearchParams(2, 4, ignore_eos=True))
    for _ in range(2):
        streams = [
            [two.submit(tokens, params) for tokens in PROMPTS]
            for params in (GREEDY, SAMPLED, PoolingParams())
        ]
        searches = [two.submit(t, BeamSearchParams(2, 4, ignore_eos=True)) for t in PROMPTS[:4]]
        owners = set(two._core._replicas.owners.values())  # type: ignore[union-attr]
        assert owners == {0, 1}
        for ours, theirs in zip(streams[:2], (greedy, sampled), strict=True):
            for stream, expected in zip(ours, theirs, strict=True):
                output = await final(stream)
                assert ids(output) == ids(expected)
                assert [o.logprobs for o in output.outputs] == [
                    o.logprobs for o in expected.outputs
                ]
        for stream, vector in zip(streams[2], vectors, strict=True):
            assert (await final(stream)).embedding == vector.outputs.embedding
        for stream, search in zip(searches, beams, strict=True):
            output = await final(stream)
            n = len(output.prompt_token_ids)
            assert ids(output) == [beam.tokens[n:] for beam in search.sequences]
        for tokens, expected in zip(PROMPTS, adapted, strict=True):
            async for output in two.generate(
                {"prompt_token_ids": tokens}, GREEDY, lora_request=request
            ):
                last = output
            assert ids(last) == ids(expected)


@pytest.mark.asyncio(loop_scope="module")
async def test_calls_reach_all_replicas(two: AsyncLLM) -> None:
    async def cached() -> list[int | None]:
        outputs = [await final(two.submit(tokens, GREEDY)) for tokens in PROMPTS]
        return [output.num_cached_tokens for output in outputs]

    await cached()
    assert sum(count or 0 for count in await cached()) > 0
    assert await two.reset_prefix_cache()
    assert (await final(two.submit(PROMPTS[0], GREEDY))).num_cached_tokens == 0
    await two.sleep(2)
    with pytest.raises(EngineError, match="sleeps"):
        two.submit(PROMPTS[0], GREEDY)
    await two.wake_up()
    before = [await final(two.submit(tokens, GREEDY)) for tokens in PROMPTS[:4]]
    await two.sleep(1)
    await two.wake_up()
    after = [await final(two.submit(tokens, GREEDY)) for tokens in PROMPTS[:4]]
    assert [ids(output) for output in before] == [ids(output) for output in after]
    assert two.health().replicas == ("ok", "ok")
    assert two.ready.num_blocks == 199 and len(two.ready.replicas) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_aborts_reach_the_replica(two: AsyncLLM) -> None:
    long = GREEDY.replace(max_tokens=150, output_kind=RequestOutputKind.DELTA)
    streams = [two.submit(tokens, long) for tokens in PROMPTS[:6]]
    await anext(aiter(streams[0]))
    for stream in streams:
        stream.abort()
    for stream in streams[1:]:
        assert (await collect(stream))[-1].finished
    for _ in range(200):
        if not (two.stats.num_running or two.stats.num_waiting):
            break
        await asyncio.sleep(0.02)
    assert two.stats.kv_usage == 0.0
    assert two._core._replicas.owners == {}  # type: ignore[union-attr]


def test_offline(one: LLM, servable: Callable[[str], ServableCheckpoint]) -> None:
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    expected = one.generate(prompts, GREEDY)
    model = str(servable("llama").directory)
    with LLM(model, data_parallel_size=2, disable_log_stats=False, **OPTIONS) as llm:
        assert [ids(o) for o in llm.generate(prompts, GREEDY)] == [ids(o) for o in expected]
        llm.sleep(1)
        llm.wake_up()
        assert llm.reset_prefix_cache()
        finished = {
            metric.labels["engine"]: metric.value
            for metric in llm.get_metrics()
            if metric.name == "vllm:generation_tokens"
        }
        assert finished.keys() == {"0", "1"} and sum(finished.values()) == 16 * 12
        assert all(finished.values())
        llm._core._cores[0].process.kill()  # type: ignore[union-attr]
        outputs = llm.generate(prompts, GREEDY)
        alive = [o for o in outputs if o.error is None]
        assert alive and all(
            ids(o) == ids(e) for o, e in zip(outputs, expected, strict=True) if o.error is None
        )
        for output in outputs:
            assert output.error is None or output.error.startswith(EngineDeadError.REPLICA_LOST)
        llm._core._cores[1].process.kill()  # type: ignore[union-attr]
        with pytest.raises(EngineDeadError, match="All 2 replicas"):
            llm.generate(prompts, GREEDY)


async def test_replicas_that_are_killed_at_any_moment(
    one: LLM, servable: Callable[[str], ServableCheckpoint]
) -> None:
    """Each request ends once: with the tokens of one process, or with one error that names its replica."""
    dice = random.Random(3)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    params = GREEDY.replace(max_tokens=60, output_kind=RequestOutputKind.DELTA)
    expected = [ids(output)[0] for output in one.generate(prompts, params)]
    before = set(psutil.Process().children(recursive=True))
    engine = await start(servable, 4)
    try:
        for victim in dice.sample(range(4), 3):
            streams = [engine.submit(tokens, params) for tokens in PROMPTS]
            owners = dict(engine._core._replicas.owners)  # type: ignore[union-attr]
            lost = [owner == victim for owner in owners.values()]
            collecting = [asyncio.create_task(collect(stream)) for stream in streams]
            await asyncio.sleep(dice.random() * 0.1)
            cores(engine)[victim].process.kill()
            late = [engine.submit(tokens, params) for tokens in PROMPTS[:4]]
            for index, task in enumerate(collecting):
                outputs = await asyncio.wait_for(task, 60)
                tokens = [t for output in outputs for t in output.outputs[0].token_ids]
                assert [output.finished for output in outputs].count(True) == 1
                last = outputs[-1]
                if last.outputs[0].finish_reason == "error":
                    assert lost[index] and last.error is not None
                    assert last.error.startswith(f"{EngineDeadError.REPLICA_LOST} {victim} ")
                    assert tokens == expected[index][: len(tokens)]
                else:
                    assert tokens == expected[index]
            for stream, tokens in zip(late, expected, strict=False):
                outputs = await asyncio.wait_for(collect(stream), 60)
                found = [t for output in outputs for t in output.outputs[0].token_ids]
                assert outputs[-1].error is not None or found == tokens
            assert engine.health().alive and engine.health().replicas[victim] == "stopped"
        assert engine.health().replicas.count("ok") == 1
        [last_one] = [i for i, state in enumerate(engine.health().replicas) if state == "ok"]
        stream = engine.submit(PROMPTS[0], params)
        cores(engine)[last_one].process.kill()
        with pytest.raises(EngineDeadError, match="All 4 replicas"):
            await asyncio.wait_for(collect(stream), 60)
        assert not engine.health().alive
    finally:
        await engine.shutdown()
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_a_replica_that_hangs_is_ended(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    engine = await start(servable, 2, worker_timeout=0.5)
    try:
        os.kill(cores(engine)[1].process.pid, signal.SIGSTOP)
        streams = [engine.submit(tokens, GREEDY) for tokens in PROMPTS]
        outputs = [await asyncio.wait_for(final(stream), 60) for stream in streams]
        errors = [output.error for output in outputs if output.error is not None]
        assert 0 < len(errors) < len(outputs) and "has not answered" in errors[0]
        assert cores(engine)[1].process.wait(20) == -signal.SIGKILL
        assert (await final(engine.submit(PROMPTS[0], GREEDY))).error is None
        assert await engine.reset_prefix_cache()
    finally:
        await engine.shutdown()


async def test_a_replica_that_computes_is_given_more_time(
    servable: Callable[[str], ServableCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(servable, 2, worker_timeout=0.5)
    group = engine._core
    assert isinstance(group, ReplicaCores)
    try:
        os.kill(cores(engine)[1].process.pid, signal.SIGSTOP)
        ticks = iter(range(0, 10**6, 1000))
        monkeypatch.setattr(replica_cores, "processor_ticks", lambda pid: next(ticks))
        cores(engine)[1].silent_checks = 9
        group.check()
        assert cores(engine)[1].silent_checks > 9 and 1 in group._alive
        monkeypatch.setattr(replica_cores, "processor_ticks", lambda pid: 10**6)
        group.check()
        group.check()
        assert group._alive == {0}
    finally:
        await engine.shutdown()


def test_the_processor_time_of_a_process() -> None:
    before = replica_cores.processor_ticks(os.getpid())
    while replica_cores.processor_ticks(os.getpid()) == before:
        pass
    assert replica_cores.processor_ticks(2**22 + 1) == 0


async def test_a_start_that_fails_leaves_no_process(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ConfigError, match="num-gpu-blocks-override"):
        await start(servable, 2, num_gpu_blocks_override=3)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_each_replica_has_its_own_cores() -> None:
    config = from_flat({"data_parallel_size": 2, "kernels": "reference"})
    group = start_cores(config)
    try:
        assert isinstance(group, ReplicaCores)
        masks = [os.sched_getaffinity(core.process.pid) for core in group._cores]
        assert masks == [set(share) for share in shares(2)]
    finally:
        group.close()
    assert all(core.process.poll() is not None for core in group._cores)


def test_the_callers_cores_are_left_as_they_are() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), pinned([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
        raise KeyError
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("visible", "found", "expected"),
    [
        (None, 4, ["0,1", "2,3"]),
        ("4,5,6,7", 4, ["4,5", "6,7"]),
        (None, 0, [None, None]),
    ],
)
def test_each_replica_has_its_own_gpus(
    visible: str | None,
    found: int,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = from_flat({"data_parallel_size": 2, "tensor_parallel_size": 2})
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in _environments(config)] == expected


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: 3)
    with pytest.raises(ConfigError, match="needs 4 GPUs, but 3"):
        start_cores(from_flat({"data_parallel_size": 2, "tensor_parallel_size": 2}))

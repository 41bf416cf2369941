"""Engine cores that are killed, stopped, or die of a request, for real: clients see nothing, or one error."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.engine.replica_cores import ReplicaCores
from quire.errors import EngineDeadError, PoisonRequestError
from quire.lora.request import LoRARequest
from quire.metrics import create_metrics, new_registry, render
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.engine import dying_core
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.weights.adapter_writer import write_adapter

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="restarts need epoll"),
]

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "num_gpu_blocks_override": 120,
}
SECONDS = 120.0
"""A liveness deadline: the machine may be busy."""
DELTA = RequestOutputKind.DELTA
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
KINDS: list[SamplingParams] = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, max_tokens=40, ignore_eos=True, logprobs=2),
    SamplingParams(n=2, temperature=1.2, seed=6, top_p=0.9, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=7, max_tokens=40, stop=["e", "t "], min_tokens=12),
    SamplingParams(
        temperature=1.0, seed=8, max_tokens=60,
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    ),
    SamplingParams(
        temperature=0.7, seed=9, max_tokens=30, presence_penalty=0.6, repetition_penalty=1.2,
        frequency_penalty=0.3, min_tokens=20, logit_bias={9: 2.0}, prompt_logprobs=1,
    ),
    SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=list(range(40, 60))),
]  # fmt: skip


@dataclass
class Answer:
    """What a client has of a request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    reasons: dict[int, tuple[str, object]] = field(default_factory=dict)
    rest: list[Any] = field(default_factory=list)


async def answer(engine: AsyncLLM, tokens: list[int], params: Any) -> Answer:
    if isinstance(params, SamplingParams):
        params = params.replace(output_kind=DELTA)
    found = Answer()
    async for output in engine.submit(tokens, params):
        for part in output.outputs:
            found.tokens.setdefault(part.index, []).extend(part.token_ids)
            found.texts[part.index] = found.texts.get(part.index, "") + part.text
            found.logprobs.setdefault(part.index, []).extend(part.logprobs or [])
            if part.finish_reason is not None:
                found.reasons[part.index] = (part.finish_reason, part.stop_reason)
        last = output
    assert last.error is None, last.error
    found.rest = [last.prompt_logprobs, last.embedding]
    return found


def asked() -> list[tuple[list[int], Any]]:
    """64 requests of every kind; also a beam search and vectors."""
    lists = prompts(61, longest=100)
    found: list[tuple[list[int], Any]] = [
        (tokens, KINDS[index % len(KINDS)]) for index, tokens in enumerate(lists)
    ]
    beam = BeamSearchParams(2, 6, ignore_eos=True)
    return [*found, (lists[0], beam), (lists[1], PoolingParams()), (lists[2], PoolingParams())]


async def start(servable: Callable[[str], ServableCheckpoint], **options: Any) -> AsyncLLM:
    model = str(servable("llama").directory)
    return await AsyncLLM.start(from_flat({"model": model, **OPTIONS, **options}))


def cores(engine: AsyncLLM) -> ReplicaCores:
    return engine._core


def pid(engine: AsyncLLM, replica: int = 0) -> int:
    return cores(engine)._cores[replica].process.pid


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def is_back(engine: AsyncLLM, old: int, replica: int = 0) -> None:
    """Another process serves."""
    await until(lambda: pid(engine, replica) != old and engine.health().replicas[replica] == "ok")


async def all_of(engine: AsyncLLM, requests: list[tuple[list[int], Any]]) -> list[Answer]:
    return await asyncio.gather(*(answer(engine, *each) for each in requests))


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize("count", [1, 2])
async def test_kill_9_under_64_streams(
    servable: Callable[[str], ServableCheckpoint], count: int
) -> None:
    """Every request ends, with the bytes of an undisturbed server."""
    dice = random.Random(count)
    engine = await start(servable, data_parallel_size=count, max_core_deaths=10)
    registry = new_registry()
    metrics = create_metrics(registry, [None] * count, model_name="m", max_model_len=256)
    engine.attach_metrics(metrics)
    try:
        expected = await all_of(engine, asked())
        total = engine_tokens(registry)
        for part in (0.0, 0.3, 0.8):
            victim = dice.randrange(count)
            old = pid(engine, victim)
            if not part:
                os.kill(old, signal.SIGSTOP)  # so that it certainly dies with requests
            running = asyncio.create_task(all_of(engine, asked()))
            before = engine_tokens(registry)
            enough = before + part * total
            await asyncio.sleep(0 if part else 0.2)
            while part and engine_tokens(registry) <= enough and not running.done():
                await asyncio.sleep(0.01)
            os.kill(old, signal.SIGKILL)
            found = await asyncio.wait_for(running, SECONDS)
            for mine, other, (_, params) in zip(found, expected, asked(), strict=True):
                assert mine == other, params
            await is_back(engine, old, victim)
            assert engine_tokens(registry) > before, "no counter has fallen"
        text = render(registry)[0].decode()
        assert value(text, "quire:core_restarts_total") == 3
        assert value(text, "quire:requests_resumed_total") > 0
        assert value(text, "quire:poison_requests_total") == 0
        await until(lambda: engine.stats.num_running == 0 and engine.stats.kv_usage == 0.0)
    finally:
        await engine.shutdown()


def value(text: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def engine_tokens(registry: Any) -> float:
    return value(render(registry)[0].decode(), "vllm:generation_tokens_total")


async def test_a_core_that_is_stopped_is_ended_and_its_requests_go_on(
    servable: Callable[[str], ServableCheckpoint], caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start(servable, core_hang_timeout=2)
    try:
        [expected] = await all_of(engine, asked()[:1])
        old = psutil.Process(pid(engine))
        os.kill(old.pid, signal.SIGSTOP)
        found = await asyncio.wait_for(answer(engine, *asked()[0]), SECONDS)
        assert found == expected and not old.is_running()
        assert "was stopped" in caplog.text
    finally:
        await engine.shutdown()


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "error", "hang"])
async def test_a_request_of_which_the_core_dies_is_ended_and_refused(
    servable: Callable[[str], ServableCheckpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    for name, text in dying_core.environment(tmp_path, how).items():
        monkeypatch.setenv(name, text)
    engine = await start(servable, core_hang_timeout=4 if how == "hang" else 0)
    deadly = [dying_core.MARK] * dying_core.TIMES
    try:
        innocent = asked()[:2] if how != "SIGKILL" else []
        expected = await all_of(engine, innocent)
        streams = asyncio.gather(*(answer(engine, *each) for each in innocent))
        await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS):
            outputs = [output async for output in engine.submit(deadly, KINDS[0])]
        assert outputs[-1].error is not None
        assert outputs[-1].error.startswith(PoisonRequestError.BEGINNING)
        assert await asyncio.wait_for(streams, SECONDS) == expected
        assert cores(engine)._num_starts[0] <= 3, "two deaths"
        assert cores(engine)._deaths == [], "both are explained"
        with pytest.raises(PoisonRequestError):
            engine.submit(deadly, KINDS[0])
        await answer(engine, *asked()[0])
    finally:
        await engine.shutdown()


async def test_after_too_many_deaths_all_requests_end_with_an_error(
    servable: Callable[[str], ServableCheckpoint], caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start(servable, max_core_deaths=2)
    long = SamplingParams(max_tokens=200, ignore_eos=True, output_kind=DELTA)
    try:
        old = pid(engine)
        os.kill(old, signal.SIGKILL)
        await is_back(engine, old)
        os.kill(pid(engine), signal.SIGSTOP)  # so that none of them ends before
        streams = [engine.submit("abc", long) for _ in range(4)]
        os.kill(pid(engine), signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match=r"SIGKILL.*--max-core-deaths"):
                async for _ in stream:
                    pass
        assert not engine.health().alive and engine.health().replicas == ("stopped",)
    finally:
        await engine.shutdown()


async def test_a_rank_that_is_killed(servable: Callable[[str], ServableCheckpoint]) -> None:
    engine = await start(servable, tensor_parallel_size=2)
    try:
        requests = asked()[:6]
        expected = await all_of(engine, requests)
        running = asyncio.create_task(all_of(engine, requests))
        await asyncio.sleep(0.05)
        [rank] = [
            each
            for each in psutil.Process(pid(engine)).children()
            if "quire.engine.worker_process" in each.cmdline()
        ]
        rank.kill()
        assert await asyncio.wait_for(running, SECONDS) == expected
        await until(lambda: engine.health().replicas == ("ok",))
        assert await all_of(engine, requests) == expected
    finally:
        await engine.shutdown()


async def test_adapters_and_sleep_are_as_they_were(
    servable: Callable[[str], ServableCheckpoint], tmp_path: Path
) -> None:
    engine = await start(servable, enable_lora=True, max_loras=2, max_lora_rank=16)
    adapter = write_adapter(tmp_path / "a", engine.model.spec, ["_proj"], seed=1)
    request = LoRARequest("a", 1, str(adapter))

    async def adapted() -> list[int]:
        async for output in engine.generate("abcd", KINDS[0], lora_request=request):
            last = output
        return list(last.outputs[0].token_ids)

    async def kill() -> None:
        old = pid(engine)
        os.kill(old, signal.SIGKILL)
        await is_back(engine, old)

    try:
        expected = await adapted()
        running = asyncio.create_task(adapted())
        await asyncio.sleep(0)
        await kill()
        assert await running == expected == await adapted()
        await engine.sleep(1)
        await kill()
        assert engine.is_sleeping
        await engine.wake_up()
        assert await adapted() == expected
    finally:
        await engine.shutdown()


async def test_calls_and_requests_that_come_meanwhile_wait(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    engine = await start(servable)
    try:
        [expected] = await all_of(engine, asked()[:1])
        os.kill(pid(engine), signal.SIGSTOP)
        call = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0)
        os.kill(pid(engine), signal.SIGKILL)
        await until(lambda: engine.health().replicas == ("restarting",))
        health = engine.health()
        assert health.alive
        assert await asyncio.wait_for(answer(engine, *asked()[0]), SECONDS) == expected
        assert await asyncio.wait_for(call, SECONDS)
    finally:
        await engine.shutdown()


@pytest.mark.usefixtures("no_process_left")
async def test_a_shutdown_while_a_core_is_started_again(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    engine = await start(servable)
    os.kill(pid(engine), signal.SIGKILL)
    await until(lambda: engine.health().replicas == ("restarting",))
    await engine.shutdown()

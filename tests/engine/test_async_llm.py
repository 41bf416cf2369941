"""`AsyncLLM`: streams, aborts, limits, and an engine that dies or stalls."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
import pytest

from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.engine.stream import RequestStream
from quire.errors import (
    EngineDeadError,
    EngineError,
    EngineSleepingError,
    InvalidParameterError,
    QueueFullError,
)
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.checkpoints import ServableCheckpoint, prompts

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "num_gpu_blocks_override": 60,
    "max_core_deaths": 1,
}
LONG = SamplingParams(
    temperature=0.0, max_tokens=200, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)


@pytest.fixture
async def engine(servable: Callable[[str], ServableCheckpoint]):
    config = from_flat({"model": str(servable("llama").directory), **OPTIONS})
    engine = await AsyncLLM.start(config)
    yield engine
    await engine.shutdown()


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def idle(engine: AsyncLLM) -> None:
    """Wait until the scheduler reports that nobody runs or waits and all blocks are free."""
    for _ in range(200):
        stats = engine.stats
        if stats.num_running == stats.num_waiting == 0 and stats.kv_usage == 0.0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not idle: {engine.stats}")


@pytest.mark.parametrize("interval", [None, 10])
async def test_deltas_add_up_to_the_whole(engine: AsyncLLM, interval: int | None) -> None:
    params = LONG.replace(
        max_tokens=40, n=3, temperature=1.0, seed=4, logprobs=1, stream_interval=interval
    )
    whole_params = params.replace(output_kind=RequestOutputKind.FINAL_ONLY)
    (whole,) = await collect(engine.submit("The quick", whole_params))
    deltas = await collect(engine.submit("The quick", params))
    cumulative = params.replace(output_kind=RequestOutputKind.CUMULATIVE)
    last = (await collect(engine.submit("The quick", cumulative)))[-1]
    assert [o.finished for o in deltas] == [False] * (len(deltas) - 1) + [True]
    for index, expected in enumerate(whole.outputs):
        parts = [c for output in deltas for c in output.outputs if c.index == index]
        assert "".join(part.text for part in parts) == expected.text
        assert [t for part in parts for t in part.token_ids] == expected.token_ids
        assert [p for part in parts for p in part.logprobs or []] == expected.logprobs
        assert parts[-1].finish_reason == expected.finish_reason == "length"
        assert all(part.finish_reason is None for part in parts[:-1])
        assert last.outputs[index].text == expected.text
    assert len({tuple(c.token_ids) for c in whole.outputs}) == 3


async def test_stop_strings_end_the_request_in_the_core_too(engine: AsyncLLM) -> None:
    (free,) = await collect(
        engine.submit("abc", LONG.replace(output_kind=RequestOutputKind.FINAL_ONLY))
    )
    stop = free.outputs[0].text[10:13]
    outputs = await collect(engine.submit("abc", LONG.replace(stop=[stop])))
    text = "".join(output.outputs[0].text for output in outputs)
    assert text == free.outputs[0].text[: free.outputs[0].text.index(stop)]
    assert outputs[-1].outputs[0].stop_reason == stop
    await idle(engine)


async def test_an_interval_makes_fewer_outputs_of_the_same_text(engine: AsyncLLM) -> None:
    params = LONG.replace(max_tokens=23)
    each = await collect(engine.submit("abc", params))
    some = await collect(engine.submit("abc", params.replace(stream_interval=5)))
    assert "".join(o.outputs[0].text for o in some) == "".join(o.outputs[0].text for o in each)
    assert [t for o in some for t in o.outputs[0].token_ids] == [
        t for o in each for t in o.outputs[0].token_ids
    ]
    sizes = [len(output.outputs[0].token_ids) for output in some]
    assert sizes[0] == 1 and all(size >= 5 for size in sizes[1:-1]) and sum(sizes) == 23
    await idle(engine)


async def test_abort_in_queue_prefill_and_decode_frees_everything(engine: AsyncLLM) -> None:
    streams = [engine.submit(p, LONG) for p in prompts(12, longest=55)]
    for index, stream in enumerate(streams):
        if index % 3 == 1:
            await asyncio.sleep(0.01)
        stream.abort()
        stream.abort()
    reasons = []
    for stream in streams:
        outputs = await collect(stream)
        assert outputs[-1].finished
        reasons.append(outputs[-1].outputs[0].finish_reason)
        if reasons[-1] == "length":  # the core ran through it while this side slept
            assert sum(len(output.outputs[0].token_ids) for output in outputs) == LONG.max_tokens
    assert reasons[:4] == ["abort"] * 4
    assert set(reasons) <= {"abort", "length"}
    assert not engine._front.is_busy
    await idle(engine)


async def test_leaving_a_stream_early_aborts_it(engine: AsyncLLM) -> None:
    iterator = aiter(engine.submit("abc", LONG))
    await anext(iterator)
    await iterator.aclose()  # type: ignore[attr-defined]
    assert not engine._front.is_busy
    await idle(engine)


async def test_request_ids_are_unique_among_live_requests(engine: AsyncLLM) -> None:
    stream = engine.submit("abc", LONG, request_id="mine")
    with pytest.raises(InvalidParameterError, match="in use"):
        engine.submit("abc", LONG, request_id="mine")
    stream.abort()
    await collect(engine.submit("abc", LONG.replace(max_tokens=1), request_id="mine"))


async def test_a_bad_request_is_refused_and_others_go_on(engine: AsyncLLM) -> None:
    good = engine.submit("abc", LONG.replace(max_tokens=30))
    for bad in ([], [10**9], [1] * 300):
        with pytest.raises(InvalidParameterError):
            engine.submit(bad, LONG)
    outputs = await collect(good)
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 30


async def test_the_queue_is_bounded(servable: Callable[[str], ServableCheckpoint]) -> None:
    options = {**OPTIONS, "max_num_queued_reqs": 3}
    config = from_flat({"model": str(servable("llama").directory), **options})
    engine = await AsyncLLM.start(config)
    try:
        streams = [engine.submit("abc", LONG) for _ in range(7)]
        with pytest.raises(QueueFullError, match="max-num-queued-reqs") as raised:
            engine.submit("abc", LONG)
        assert raised.value.retry_after >= 1.0
        for stream in streams:
            stream.abort()
        await collect(engine.submit("abc", LONG.replace(max_tokens=1)))
    finally:
        await engine.shutdown()


async def test_salts_keep_tenants_apart(engine: AsyncLLM) -> None:
    params = LONG.replace(max_tokens=2)
    prompt = list(range(64))

    async def cached(salt: str | None) -> int | None:
        return (await collect(engine.submit(prompt, params, placement=Placement(cache_salt=salt))))[
            -1
        ].num_cached_tokens

    assert await cached("a") == 0
    assert await cached("a") == 63
    assert await cached("b") == 0
    assert await cached(None) == 0


async def test_a_killed_core_fails_every_stream_and_health(engine: AsyncLLM) -> None:
    streams = [engine.submit("abc", LONG) for _ in range(6)]
    await anext(aiter(streams[0]))
    engine._core._cores[0].process.kill()
    for stream in streams[1:]:
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(collect(stream), 20)
    assert not engine.health().alive
    with pytest.raises(EngineDeadError):
        engine.submit("abc", LONG)


async def test_health_is_the_loops_heartbeat_not_the_process(engine: AsyncLLM) -> None:
    """A core that is stopped, not dead, is found out."""
    assert engine.health(timeout=3.0).alive
    os.kill(engine._core._cores[0].process.pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            await asyncio.sleep(0.1)
            if not engine.health(timeout=3.0).alive:
                break
        else:
            raise AssertionError("a stopped core still counts as alive")
    finally:
        os.kill(engine._core._cores[0].process.pid, signal.SIGCONT)
    await collect(engine.submit("abc", LONG.replace(max_tokens=2)))
    assert engine.health(timeout=3.0).alive


async def test_a_cancelled_start_leaves_no_process(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    config = from_flat({"model": str(servable("llama").directory), **OPTIONS})
    before = set(psutil.Process().children(recursive=True))
    starting = asyncio.create_task(AsyncLLM.start(config))
    while not set(psutil.Process().children(recursive=True)) - before:
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, 20)
    assert set(psutil.Process().children(recursive=True)) <= before


async def start_and_cancel(call: Coroutine[Any, Any, object]) -> None:
    """Cancel a call that has sent its message and waits for the answer."""
    task = asyncio.create_task(call)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_wake_up_leaves_the_engine_alive(engine: AsyncLLM) -> None:
    await start_and_cancel(engine.wake_up())
    await engine.wake_up()
    assert not engine.is_dead and not engine.is_sleeping
    await collect(engine.submit("abc", LONG.replace(max_tokens=2)))


async def test_a_sleep_cancelled_while_requests_run_leaves_the_engine_awake(
    engine: AsyncLLM,
) -> None:
    stream = engine.submit("abc", LONG)
    await start_and_cancel(engine.sleep())
    assert not engine.is_sleeping
    await collect(engine.submit("abc", LONG.replace(max_tokens=2)))
    stream.abort()


async def test_a_sleep_cancelled_after_it_was_sent_takes_place(engine: AsyncLLM) -> None:
    await start_and_cancel(engine.sleep(2))
    assert engine.is_sleeping, "the core has been told"
    with pytest.raises(EngineSleepingError):
        engine.submit("abc", LONG)
    await engine.wake_up()
    await collect(engine.submit("abc", LONG.replace(max_tokens=2)))


async def test_control_calls_at_once_are_carried_out_in_order(engine: AsyncLLM) -> None:
    await asyncio.gather(engine.sleep(1), engine.sleep(2), engine.wake_up(), engine.sleep(1))
    assert engine.is_sleeping
    await asyncio.gather(engine.sleep(2), engine.reset_prefix_cache(), engine.wake_up())
    assert not engine.is_sleeping
    await collect(engine.submit("abc", LONG.replace(max_tokens=2)))


async def test_wake_up_calls_off_a_sleep_that_waits_for_requests(engine: AsyncLLM) -> None:
    stream = engine.submit("abc", LONG)
    sleeping = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0)
    assert engine.is_sleeping
    await engine.wake_up()
    with pytest.raises(EngineError, match="wake_up"):
        await sleeping
    assert not engine.is_sleeping
    assert (await collect(stream))[-1].outputs[0].finish_reason == "length"


async def test_a_prefix_cache_that_is_emptied_is_found_empty(engine: AsyncLLM) -> None:
    params = LONG.replace(max_tokens=2)
    await collect(engine.submit([5] * 40, params))
    assert await engine.reset_prefix_cache() is True
    assert (await collect(engine.submit([5] * 40, params)))[-1].num_cached_tokens == 0


async def test_control_calls_of_an_engine_that_dies_raise(engine: AsyncLLM) -> None:
    os.kill(engine._core._cores[0].process.pid, signal.SIGSTOP)  # nothing is answered
    calls = [
        asyncio.create_task(call)
        for call in (engine.sleep(), engine.wake_up(), engine.reset_prefix_cache())
    ]
    await asyncio.sleep(0)
    await start_and_cancel(engine.wake_up())
    engine._core._cores[0].process.kill()
    for call in calls:
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(call, 20)
    with pytest.raises(EngineDeadError):
        await engine.wake_up()


async def test_shutdown_ends_the_control_calls_that_wait(engine: AsyncLLM) -> None:
    stream = engine.submit("abc", LONG)
    sleeping = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await asyncio.wait_for(sleeping, 20)
    assert (await collect(stream))[-1].outputs[0].finish_reason == "abort"

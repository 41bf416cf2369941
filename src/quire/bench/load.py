"""Sends requests when they are due, and collects their exchanges."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from quire.bench.client import Exchange, HttpPool

T = TypeVar("T")

START_MARGIN = 0.05
"""Seconds between making the schedule and its zero, so that request 0 is not already late."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One `Exchange` per request, in the order of the schedule. Times are `perf_counter` seconds."""

    exchanges: list[Exchange]
    due: list[float]
    start: float
    duration: float
    """From the schedule's zero to the end of the last request."""


async def run_load(
    pool: HttpPool,
    requests: Sequence[bytes],
    times: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Exchange], None] = lambda exchange: None,
) -> LoadResult:
    """requests: as `HttpPool.prepare` makes them; times: seconds from the start at which each is due.

    Every request ends in exactly one Exchange, failed ones too.
    """
    ask = _asker(pool, max_concurrency, on_done)
    with quiet_collector():
        start = perf_counter() + START_MARGIN
        tasks: list[asyncio.Task[Exchange]] = []
        async with asyncio.TaskGroup() as group:
            for request, time in zip(requests, times, strict=True):
                while (wait := start + time - perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(ask(request)))
        duration = perf_counter() - start
    return LoadResult(
        [task.result() for task in tasks], [start + time for time in times], start, duration
    )


@dataclass(frozen=True, slots=True)
class Script:
    """One session of several turns, each sent after the answer to the one before it."""

    start: float
    """Seconds from the start of the run to the first turn."""
    num_turns: int
    request: Callable[[int, Sequence[str]], bytes]
    """A turn (from 0) and the texts of the answers before it -> its request, as of `HttpPool.prepare`."""


async def run_sessions(
    pool: HttpPool,
    scripts: Sequence[Script],
    *,
    think_time: float,
    max_concurrency: int | None = None,
    on_done: Callable[[Exchange], None] = lambda exchange: None,
) -> LoadResult:
    """Run all sessions at once. A turn is due `think_time` seconds after the end of the one before it.

    The result has every turn, session by session. Turns after a failed one are not sent, and fail.
    """
    ask = _asker(pool, max_concurrency, on_done)

    async def one(script: Script) -> list[tuple[Exchange, float]]:
        turns: list[tuple[Exchange, float]] = []
        due = start + script.start
        for turn in range(script.num_turns):
            request = script.request(turn, [exchange.text for exchange, _ in turns])
            await asyncio.sleep(max(due - perf_counter(), 0.0))
            exchange = await ask(request)
            turns.append((exchange, due))
            if exchange.error:
                break
            due = max(exchange.finished, exchange.sent) + think_time
        for _ in range(script.num_turns - len(turns)):
            skipped = Exchange(sent=due)
            skipped.fail("not sent: an earlier turn of the session failed")
            on_done(skipped)
            turns.append((skipped, due))
        return turns

    with quiet_collector():
        start = perf_counter() + START_MARGIN
        sessions = await asyncio.gather(*map(one, scripts))
        duration = perf_counter() - start
    turns = [turn for session in sessions for turn in session]
    return LoadResult([turn for turn, _ in turns], [due for _, due in turns], start, duration)


def _asker(
    pool: HttpPool, max_concurrency: int | None, on_done: Callable[[Exchange], None]
) -> Callable[[bytes], Coroutine[object, object, Exchange]]:
    """Sends one request and waits for its whole answer."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else nullcontext()

    async def ask(request: bytes) -> Exchange:
        async with gate:
            exchange = await pool.ask(request)
        if not exchange.error and exchange.body:
            exchange.fail("the answer is not an event stream")
        on_done(exchange)
        return exchange

    return ask


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection during the run: a full one stops every stamp for tens of milliseconds."""
    gc.collect()
    gc.freeze()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def allow_many_sockets() -> None:
    """Raise the limit on open files as far as possible: at a rate of inf, each request is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_async(main: Coroutine[object, object, T]) -> T:
    """`asyncio.run`, with uvloop if it is installed: a third more requests per second."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)

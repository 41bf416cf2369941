"""Sends requests when they are due, and collects their exchanges."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None

    async def one(request: bytes) -> Exchange:
        if gate is None:
            exchange = await pool.ask(request)
        else:
            async with gate:
                exchange = await pool.ask(request)
        if not exchange.error and exchange.body:
            exchange.fail("the answer is not an event stream")
        on_done(exchange)
        return exchange

    with quiet_collector():
        start = perf_counter() + START_MARGIN
        tasks: list[asyncio.Task[Exchange]] = []
        async with asyncio.TaskGroup() as group:
            for request, time in zip(requests, times, strict=True):
                while (wait := start + time - perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(request)))
        duration = perf_counter() - start
    return LoadResult(
        [task.result() for task in tasks], [start + time for time in times], start, duration
    )


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

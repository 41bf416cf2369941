"""The phases of a server process: bind, answer probes, load, serve, drain, exit.

Exit status: 0 after a signal, 1 if the engine died. Errors during the start are raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from quire.config import EngineConfig, ServerConfig
from quire.engine import record_files
from quire.engine.assemble import check_local
from quire.engine.replica_cores import ReplicaCores
from quire.errors import QuireError
from quire.messages import describe_ledger
from quire.server.engine_protocol import ServingEngine
from quire.server.errors import ApiError, unavailable
from quire.server.keys import configured_keys, with_fair_shares
from quire.server.listeners import Listeners, open_listeners
from quire.server.process import HttpServer
from quire.server.state import ServerState
from quire.server.tracing import create_tracer

logger = logging.getLogger(__name__)

T = TypeVar("T")
EngineFactory = Callable[[], Awaitable[ServingEngine]]

DEATH_CHECK_SECONDS = 0.25
FAREWELL_SECONDS = 2.0
"""Seconds for aborted requests to send their error."""


@runtime_checkable
class Recording(Protocol):
    """An engine with a record of its decisions."""

    async def records(self) -> list[bytes]: ...


class StopSignals:
    """Counts SIGTERM and SIGINT: the first starts a drain, the second ends the process now."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.now = asyncio.Event()

    def hit(self) -> None:
        if self.requested.is_set():
            self.now.set()
        self.requested.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals; outside the main thread, none."""
        loop = asyncio.get_running_loop()
        handled = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self.hit)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def serve(engine_config: EngineConfig, server_config: ServerConfig, core: ReplicaCores) -> int:
    """Run the server on `core`, which is not configured yet, until a signal. Returns the exit status.

    Raises errors during the start. Errors in a local model's files are raised before the port is bound.
    """

    async def engine() -> ServingEngine:
        from quire.engine.async_llm import AsyncLLM

        started = await AsyncLLM.start(engine_config, core)
        gc.freeze()  # these objects stay alive: the garbage collector need not traverse them again
        return started

    keys = configured_keys(server_config, os.environ)
    engine_config = with_fair_shares(engine_config, keys)
    check_local(engine_config)  # report a wrong path before the line "listening on"
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve_engine(engine, engine_config, server_config))


async def serve_engine(
    engine_factory: EngineFactory,
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    stop: StopSignals | None = None,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Serve the engine that `engine_factory` makes. Probes are answered before it is called.

    announce: called with the API's URL once it listens; the default logs it.
    Raises `ConfigError` for an address or key that cannot be used, and whatever the factory raises.
    """
    stop = stop or StopSignals()
    keys = configured_keys(server_config, os.environ)
    state = ServerState(server_config, engine_config)
    state.tracer = create_tracer(server_config, os.environ)
    with open_listeners(server_config, state, keys, os.environ) as listeners, stop.installed():
        http = asyncio.create_task(listeners.run(), name="quire-http")
        try:
            await listeners.wait_started(http)
            (announce or _announce)(listeners.api.url)
            if listeners.admin is not None:
                _announce(listeners.admin.url, what="admin endpoints")
            if listeners.warning:
                logger.warning(listeners.warning)
            async with keys.followed():
                return await _load_and_serve(engine_factory, state, stop, listeners, http)
        finally:
            listeners.stop()
            await asyncio.wait((http,))
            await state.close()


def _save_on_signal(engine: ServingEngine, directory: str | None) -> None:
    """On SIGUSR1 write the record of decisions of each core to a file."""
    if not isinstance(engine, Recording):
        return
    loop = asyncio.get_running_loop()
    saving: set[asyncio.Task[None]] = set()

    async def save() -> None:
        try:
            records = await engine.records()
        except QuireError as error:
            logger.error("SIGUSR1: the record of decisions could not be read: %s", error)
            return
        await asyncio.to_thread(record_files.save, directory, records, "SIGUSR1")

    def begin() -> None:
        task = loop.create_task(save())
        saving.add(task)
        task.add_done_callback(saving.discard)

    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
        loop.add_signal_handler(signal.SIGUSR1, begin)


async def _load_and_serve(
    engine_factory: EngineFactory,
    state: ServerState,
    stop: StopSignals,
    server: Listeners,
    http: asyncio.Task[None],
) -> int:
    begun = time.monotonic()
    loading = asyncio.ensure_future(engine_factory())
    if not await _first(loading, http, stop.requested):
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # no longer of interest
            late = await loading  # a factory that ignored being cancelled
            await late.shutdown()
        return _status(http)
    engine = loading.result()
    try:
        _save_on_signal(engine, state.engine_config.scheduler.decision_record_dir)
        state.engine_loaded(engine)
        logger.info("memory: %s", describe_ledger(engine.ready))
        logger.info(
            "ready: %s, %d tokens of context, in %.1f s",
            ", ".join(engine.model.names),
            engine.model.max_model_len,
            time.monotonic() - begun,
        )
        return await _serve_until_stopped(state, engine, stop, server, http)
    finally:
        await engine.shutdown()


async def _serve_until_stopped(
    state: ServerState,
    engine: ServingEngine,
    stop: StopSignals,
    server: Listeners,
    http: asyncio.Task[None],
) -> int:
    death = asyncio.create_task(_death_of(engine), name="quire-death-watch")
    stats = asyncio.create_task(_log_stats(state), name="quire-log-stats")
    try:
        died = await _first(death, http, stop.requested)
        if died:
            state.fail(death.result())
            logger.error("%s The server exits.", death.result())
            await state.live.wait_idle(FAREWELL_SECONDS)
            state.live.terminate_all(ApiError(500, "The engine has stopped."))
            await state.live.wait_idle(FAREWELL_SECONDS)
            return 1
        if http.done():
            return _status(http)
        await drain(state, stop, server)
        return 0
    finally:
        death.cancel()
        stats.cancel()


async def drain(state: ServerState, stop: StopSignals, server: Listeners) -> None:
    """Refuse new requests, after `drain_delay`, and let running ones finish until the deadline or a second
    signal. Then end the rest with an error to their clients."""
    if state.config.drain_delay:
        state.leave()
        logger.info("leaving: requests are served for %g s", state.config.drain_delay)
    await hand_over(server, stop, state.config.drain_delay)
    state.drain()
    seconds = state.config.shutdown_timeout
    logger.info("draining: %d requests, %g s at most", len(state.live), seconds)
    idle = asyncio.ensure_future(state.live.wait_idle(seconds))
    await _first(idle, None, stop.now)
    idle.cancel()
    if len(state.live):
        logger.warning("shutdown ends %d requests that still run", len(state.live))
        state.live.terminate_all(unavailable("The server is shutting down.", retry_after=1))
        await state.live.wait_idle(FAREWELL_SECONDS)


async def hand_over(server: Listeners | HttpServer, stop: StopSignals, seconds: float) -> None:
    """Have clients go elsewhere: close connections after their answers, and in the end, or at a second
    signal, those that are idle."""
    server.close_connections(idle=False)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.now.wait()
    server.close_connections(idle=True)


async def _first(
    work: asyncio.Future[T], http: asyncio.Task[None] | None, event: asyncio.Event
) -> bool:
    """Whether `work` ended before the HTTP server did and before `event`."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        futures: list[asyncio.Future[Any]] = [work, waiting]
        if http is not None:
            futures.append(http)
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return work.done() and not event.is_set()


async def _death_of(engine: ServingEngine) -> str:
    """Waits for the engine's death, and returns its reason. A stalled engine is not dead; /health reports
    it."""
    while not engine.is_dead:
        await asyncio.sleep(DEATH_CHECK_SECONDS)
    return engine.health(float("inf")).reason


async def _log_stats(state: ServerState) -> None:
    interval = state.config.log_stats_interval
    while interval > 0 and not state.engine_config.runtime.disable_log_stats:
        for log in state.stats_logs:
            log.log(time.monotonic())
        await asyncio.sleep(interval)


def _status(http: asyncio.Task[None]) -> int:
    """0 unless the HTTP server itself failed."""
    if http.done() and not http.cancelled() and http.exception() is not None:
        logger.error("the HTTP server failed", exc_info=http.exception())
        return 1
    return 0


def _announce(url: str, what: str = "listening") -> None:
    logger.info("%s on %s", what, url)
    if not logger.isEnabledFor(
        logging.INFO
    ):  # with port 0, the line is the only way to learn the port
        sys.stderr.write(f"quire: {what} on {url}\n")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop

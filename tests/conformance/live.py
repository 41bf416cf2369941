"""A server in a thread of this process, on any engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import httpx

from quire.config import ServerConfig, from_flat
from quire.engine.async_llm import AsyncLLM
from quire.server.engine_protocol import ServingEngine
from quire.server.run import StopSignals, serve_engine

CONFIG = from_flat({"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "seed": 0})


@contextmanager
def live_server(
    make_engine: Callable[[], Awaitable[ServingEngine]], **config: object
) -> Iterator[httpx.Client]:
    """A client of a server that is ready; `base_url` says where."""
    url: Future[str] = Future()
    stop = StopSignals()
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            server = ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=5.0, **config)
            loop.run_until_complete(
                serve_engine(make_engine, CONFIG, server, stop=stop, announce=url.set_result)
            )
        except BaseException as error:
            if not url.done():
                url.set_exception(error)
            raise
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        with httpx.Client(base_url=url.result(60), timeout=60) as client:
            while client.get("/ready").status_code != 200:
                assert thread.is_alive()
            yield client
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.hit)
        thread.join()


async def builtin_engine() -> ServingEngine:
    return await AsyncLLM.start(CONFIG)

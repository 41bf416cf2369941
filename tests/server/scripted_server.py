"""A real server over a scripted engine, for programs that talk HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from browser import SECONDS
from scripted_engine import ScriptedEngine

from quire.config import EngineConfig, ServerConfig
from quire.server.run import StopSignals, serve_engine


class Server:
    """A scripted engine behind a real server, in a thread of its own."""

    def __init__(self, engine: ScriptedEngine, *, loaded: bool, **config: object) -> None:
        self.engine = engine
        self.url = ""
        self._config = replace(
            ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=0.0), **config
        )
        self._loaded = loaded
        self._listening = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self._listening.wait(SECONDS)

    async def _serve(self) -> None:
        self.loop, self.stop, self._may_load = (
            asyncio.get_running_loop(), StopSignals(), asyncio.Event(),
        )  # fmt: skip
        if self._loaded:
            self._may_load.set()

        async def factory() -> ScriptedEngine:
            await self._may_load.wait()
            return self.engine

        await serve_engine(
            factory, EngineConfig(), self._config, stop=self.stop, announce=self._announce
        )

    def _announce(self, url: str) -> None:
        self.url = url
        self._listening.set()

    def load(self) -> None:
        self.loop.call_soon_threadsafe(self._may_load.set)

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.engine.release)

    def hold_at(self, held: int) -> None:
        """Let `held` tokens out, then none until `release`: once."""
        original = self.engine.next_token

        async def valve(position: int = 0) -> None:
            if position == held:
                self.engine.next_token = original
                self.engine.hold()
            await original(position)

        self.engine.next_token = valve

    def prompt(self, index: int = -1) -> str:
        return self.engine.model.tokenizer.decode(self.engine.submitted[index].prompt)


@contextmanager
def serving(
    engine: ScriptedEngine | None = None, *, loaded: bool = True, **config: object
) -> Iterator[Server]:
    server = Server(engine or ScriptedEngine(max_model_len=100_000), loaded=loaded, **config)
    try:
        yield server
    finally:
        for call in (server.stop.hit, server.stop.hit, server.engine.release):
            server.loop.call_soon_threadsafe(call)
        server.thread.join(SECONDS)

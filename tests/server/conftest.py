"""Server tests: the app in this process, driven through httpx's ASGI transport."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser import chromium
from scripted_engine import ScriptedEngine

from quire.config import EngineConfig, ServerConfig
from quire.server.app import build_app
from quire.server.state import ServerState


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def make_client(engine) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """`make_client(loaded=True, api_keys=(), engine_config=..., **ServerConfig fields)`; `.state` is the
    app's."""
    clients = []

    def make(
        *, loaded: bool = True, api_keys=(), engine_config: EngineConfig | None = None, **config
    ) -> httpx.AsyncClient:
        state = ServerState(replace(ServerConfig(), **config), engine_config or EngineConfig())
        if loaded:
            state.engine_loaded(engine)
        app = build_app(state, api_keys=api_keys)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        client = httpx.AsyncClient(transport=transport, base_url="http://test")
        client.state = state
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def client(make_client) -> httpx.AsyncClient:
    return make_client()


@pytest.fixture(scope="session")
def driver():
    started = chromium()
    yield started
    started.quit()

"""A client that does not read its stream delays nobody."""

from __future__ import annotations

import asyncio
import json

import httpx
from tests.server.scripted_engine import ScriptedEngine

from quire.config import EngineConfig, ServerConfig
from quire.server.run import StopSignals, serve_engine


async def test_others_are_served_beside_one_who_does_not_read():
    engine = ScriptedEngine()
    engine.answer = ["x" * 4096] * 5000
    stop, url = StopSignals(), asyncio.get_running_loop().create_future()

    async def factory():
        return engine

    config = ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=0.0)
    task = asyncio.create_task(
        serve_engine(factory, EngineConfig(), config, stop=stop, announce=url.set_result)
    )
    address = httpx.URL(await asyncio.wait_for(url, 30))
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        async with asyncio.timeout(30):
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
        body = json.dumps({"prompt": "a", "max_tokens": 50, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(30):
            while not engine.streams:
                await asyncio.sleep(0.01)
        answer = await client.post("/v1/completions", json={"prompt": "b", "max_tokens": 1})
        assert answer.status_code == 200
        assert (await client.get("/health")).status_code == 200
        writer.close()
    stop.hit()
    assert await asyncio.wait_for(task, 60) == 0

"""Processes of the command, and a scripted OpenAI-compatible server to test clients without a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import quire

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`spawn("serve", ...)` starts `quire serve ...` in a process group of its own, with pipes. Whatever
    becomes of the test, none of it is left running."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "quire", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(quire.__file__).parents[1])},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(ValueError):  # its pipes are closed already
            process.communicate(timeout=10)


@dataclass
class ScriptedServer:
    """Answers `/v1/models` and chat; `answers` is what comes next, `requests` what was asked.

    An answer is a list of text deltas, or raw bytes to send as the whole HTTP response.
    """

    answers: list[list[str] | bytes] = field(default_factory=list)
    requests: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    drop_before_done: bool = False

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handle(reader, writer)
            await writer.drain()
        except (ConnectionError, ValueError):  # the client has had enough, or said nothing
            pass
        finally:
            writer.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split(" ")
        headers: dict[str, str] = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.headers.append(headers)
        if path == "/v1/models":
            content = json.dumps({"data": [{"id": "scripted"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        elif method == "POST":
            self.requests.append(json.loads(body))
            answer = self.answers.pop(0)
            writer.write(answer if isinstance(answer, bytes) else self._stream(answer))
        else:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def _stream(self, deltas: list[str]) -> bytes:
        """Server-sent events in HTTP chunks that break in the middle of lines and of characters."""
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": text}, "text": text}]} for text in deltas]
        lines = ": keep-alive\n\n" + "".join(
            f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events
        )
        payload = (lines + ("" if self.drop_before_done else "data: [DONE]\n\n")).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        pieces = [payload[start : start + 7] for start in range(0, len(payload), 7)]
        return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.fixture
def scripted_server() -> Iterator[ScriptedServer]:
    script = ScriptedServer()
    started = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        server = await asyncio.start_server(script.handle, "127.0.0.1", 0)
        script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await over.wait()
        server.close()
        # Handlers that are left end here, so that no transport stays open.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    yield script
    stop[0]()
    thread.join(10)
    assert not thread.is_alive()

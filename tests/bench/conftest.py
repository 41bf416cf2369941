"""Servers to point the load client at: the null server, and one that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager

import pytest

from quire.bench.null_server import NullOptions, serve_null
from quire.builtin import MODEL_DIR
from quire.text import Tokenizer

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[object, object, None]]


@contextmanager
def in_thread(
    serve: Callable[[Callable[[int], None]], Coroutine[object, object, None]],
) -> Iterator[str]:
    """Run `serve(on_ready)` in a loop of its own until the end; the address it serves at."""
    ready = threading.Event()
    ports: list[int] = []
    stop: list[Callable[[], object]] = []

    async def main() -> None:
        task = asyncio.ensure_future(serve(lambda port: (ports.append(port), ready.set())[0]))
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
        await asyncio.gather(task, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def null_server() -> Iterator[str]:
    with in_thread(lambda ready: serve_null(NullOptions(), on_ready=ready)) as url:
        yield url


@contextmanager
def rude_server(handle: Handler) -> Iterator[str]:
    """A server whose every connection is `handle`d."""

    async def serve(ready: Callable[[int], None]) -> None:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handle(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        ready(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()

    with in_thread(serve) as url:
        yield url


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request's body; raises at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(MODEL_DIR)

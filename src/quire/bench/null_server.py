"""A server that answers at once and computes nothing: with it, a load client measures its own overhead.

It implements a small part of OpenAI's streaming. Chunks of text are sent on a schedule that is fixed when
the request has been read. With `stamp`, a chunk's text is the server's time at the write in nanoseconds
(`perf_counter_ns`, the same clock in all processes of a machine). The client's time minus this is the
client's error, which includes the operating system's part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import cast

import httptools


@dataclass(frozen=True, slots=True)
class NullOptions:
    """chunks: the number of chunks of an answer (None: its max_tokens). interval: seconds between them; 0
    sends them as fast as the socket takes them, one write each. first: seconds before the first.
    tokens_per_chunk: for usage."""

    chunks: int | None = None
    interval: float = 0.0
    first: float = 0.0
    tokens_per_chunk: int = 1
    stamp: bool = False


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
MODELS = b'{"object":"list","data":[{"id":"null","object":"model"}]}'


class _NullProtocol(asyncio.Protocol):
    def __init__(self, options: NullOptions) -> None:
        self._options = options
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body = b""
        self._task: asyncio.Task[None] | None = None
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.close()

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        self._keep_alive = self._parser.should_keep_alive()
        if self._url.endswith(b"/models"):
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            )
            self._transport.write(head % len(MODELS) + MODELS)
        elif self._options.interval or self._options.first:
            self._task = asyncio.get_running_loop().create_task(self._paced(self._num_chunks()))
        else:
            self._at_once(self._num_chunks())

    def _num_chunks(self) -> int:
        if self._options.chunks is not None:
            return self._options.chunks
        body = json.loads(self._body)
        return int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)

    def _at_once(self, count: int) -> None:
        assert self._transport is not None
        self._transport.write(HEAD)
        for _ in range(count):
            self._transport.write(self._chunk())
        self._end(self._transport, count)

    async def _paced(self, count: int) -> None:
        """Chunk i is due at `first + i * interval`; a late one does not delay the next."""
        zero = perf_counter() + self._options.first
        if self._transport is not None:
            self._transport.write(HEAD)
        for i in range(count):
            wait = zero + i * self._options.interval - perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if self._transport is None:
                return
            self._transport.write(self._chunk())
        if self._transport is not None:
            self._end(self._transport, count)

    def _end(self, transport: asyncio.Transport, count: int) -> None:
        transport.write(self._tail(count))
        if not self._keep_alive:
            transport.close()

    def _chunk(self) -> bytes:
        text = b"%d " % perf_counter_ns() if self._options.stamp else b" null"
        event = (
            b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"null",'
            b'"choices":[{"index":0,"text":"%b","delta":{"content":"%b"},"finish_reason":null}]}\n\n'
            % (text, text)
        )
        return b"%x\r\n%b\r\n" % (len(event), event)

    def _tail(self, count: int) -> bytes:
        tokens = count * self._options.tokens_per_chunk
        event = (
            b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
            b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n'
            b"data: [DONE]\n\n" % tokens
        )
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


async def serve_null(
    options: NullOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Serve until cancelled. `on_ready` is called with the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _NullProtocol(options), host, port, backlog=4096)
    on_ready(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()

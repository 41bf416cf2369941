"""The load client's own HTTP/1.1: a connection is one asyncio protocol, and a chunk takes microseconds.

A general HTTP library spends time on things that a benchmark does not need (redirects, cookies, content
codings, a task and several queues per response), and that time becomes part of the measured latencies;
docs/benchmarking.md has figures. Here bytes go from the socket through llhttp (`httptools`) and
`SseParser` to a time stamp in one call of `data_received`. Chunks that arrive in one read get the same
time stamp.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from quire.errors import ConfigError
from quire.util.sse import SseParser
from quire.util.version import VERSION

CONNECT_SECONDS = 30.0
LINGER_SECONDS = 1.0
"""Seconds after `[DONE]` for the end of the response; then the connection is closed."""
MAX_BODY_BYTES = 1 << 20
MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times are `perf_counter` seconds.

    A chunk counts as output if it has text (content, reasoning or a tool call), however many tokens that
    is. A chunk with only a role, a finish reason or usage does not count.
    """

    sent: float = 0.0
    """The start of the request, before a new connection is opened: users wait for that too."""
    chunk_times: list[float] = field(default_factory=list)
    finished: float = 0.0
    """The last chunk with a choice: the last text, or the finish reason."""
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    status: int = 0
    """0 if there was no answer."""
    error: str = ""
    body: bytearray = field(default_factory=bytearray)
    """Only for an answer that is not an event stream."""
    done: bool = False

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def unfinished(self) -> bool:
        """Whether the stream has not ended, and the answer is a stream."""
        if self.status not in (0, 200) or self.body:
            return False
        return not self.done and self.finish_reason is None

    def fail(self, message: str) -> None:
        self.error = self.error or message[:MAX_ERROR_CHARS]

    def event(self, data: bytes, now: float) -> None:
        """Handle one event's payload."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as problem:
            self.fail(f"an event is not a completion chunk ({problem})")
            return
        if (error := bytes(chunk.error)) not in (b"", b"null"):
            self.fail(f"error in the stream: {error_text(error)}")
            return
        for choice in chunk.choices or ():
            text = choice.output()
            if text:
                self.texts.append(text)
                self.chunk_times.append(now)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            self.finished = now
        if (usage := chunk.usage) is not None:
            self.prompt_tokens = usage.prompt_tokens
            self.completion_tokens = usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens


_NOTHING = msgspec.Raw()


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _NOTHING


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def output(self) -> str:
        if self.delta is None:
            return self.text or ""
        delta = self.delta
        text = delta.content or delta.reasoning_content or delta.reasoning or ""
        if not text and (raw := bytes(delta.tool_calls)) not in (b"", b"null", b"[]"):
            return raw.decode("utf-8", "replace")
        return text


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _NOTHING


_decode = msgspec.json.Decoder(_Chunk).decode


def error_text(body: bytes) -> str:
    """The message of an error, in OpenAI's format or any other, on one line."""
    text = body.decode("utf-8", "replace")
    with suppress(msgspec.DecodeError):
        content = msgspec.json.decode(body)
        if isinstance(content, dict) and "error" in content:
            content = content["error"]
        if isinstance(content, dict) and "message" in content:
            content = content["message"]
        text = content if isinstance(content, str) else text
    return " ".join(text.split())[:MAX_ERROR_CHARS]


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. The methods named `on_...` are httptools' callbacks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sse: SseParser | None = None
        self._exchange: Exchange | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._now = 0.0
        self._answered = False
        self.open = False
        self.reusable = False
        """The last answer was read to its end, so that another request may follow."""
        self.stale = False
        """The server closed the connection before the first byte of its answer."""

    # --- the pool's side ---

    async def send(self, request: bytes, exchange: Exchange, timeout: float) -> None:
        """Returns when the exchange is over, failed or not."""
        loop = asyncio.get_running_loop()
        self._exchange, self._sse = exchange, None
        self._answered = self.stale = self.reusable = False
        self._waiter = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        timer = loop.call_later(timeout, self._give_up, f"no end within {timeout:g} s")
        assert self._transport is not None
        self._transport.write(request)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._exchange = None
            if not self.reusable:
                self.close()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self, reason: str) -> None:
        if self._exchange is not None and not self._exchange.done:
            self._exchange.fail(reason)
        self._over()
        self.close()

    def _over(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        if self._exchange is None:
            return self.close()  # data without a request
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._give_up(f"the answer is not HTTP/1.1 ({error})")
        except ValueError as error:
            self._give_up(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._exchange is not None:
            self.stale = not self._answered
            if self._exchange.unfinished:
                reason = f" ({error})" if error is not None and str(error) else ""
                self._exchange.fail(f"the server closed the connection{reason}")
        self._over()

    # --- httptools' side ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and value.lower().startswith(b"text/event-stream"):
            self._sse = SseParser()

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._sse is None or exchange.status != 200:
            exchange.body += body
            if len(exchange.body) > MAX_BODY_BYTES:
                raise ValueError("the answer is not a stream and too long")
            return
        for event in self._sse.feed(body):
            exchange.event(event, self._now)
        if exchange.done:
            loop = asyncio.get_running_loop()
            loop.call_later(LINGER_SECONDS, self._give_up_if, exchange)

    def _give_up_if(self, exchange: Exchange) -> None:
        if self._exchange is exchange:
            self._give_up("")

    def on_message_complete(self) -> None:
        self.reusable = self.open and self._parser.should_keep_alive()
        self._over()


class HttpPool:
    """Connections to one server, reused for later requests. A new one is opened only if all are in use."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        insecure: bool = False,
        timeout: float = 21600.0,
    ) -> None:
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ConfigError(f"base_url must begin with http:// or https://, got {url!r}.")
        self.url = url
        self._host = place.hostname
        self._port = place.port or (443 if place.scheme == "https" else 80)
        self._prefix = place.path.rstrip("/")
        self._timeout = timeout
        self._ssl = _ssl_context(insecure) if place.scheme == "https" else None
        self._address: tuple[str, int] | None = None
        self._idle: list[_Connection] = []
        lines = {
            "Host": place.netloc.rpartition("@")[2],
            "User-Agent": f"quire-bench/{VERSION}",
            "Accept": "text/event-stream, application/json",
            **(headers or {}),
        }
        for name, value in lines.items():
            if not (name + value).isascii() or not (name + value).isprintable():
                raise ConfigError(f"header {name} must be printable ASCII.")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    def prepare(self, path: str, body: bytes | None = None) -> bytes:
        """A whole request as bytes, so that sending it later is one write."""
        method = "GET" if body is None else "POST"
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + (body or b"")

    async def ask(self, request: bytes) -> Exchange:
        """Send a request made by `prepare`. Errors of the server are in `Exchange.error` and are not
        raised."""
        exchange = Exchange(sent=perf_counter())
        while self._idle:
            connection = self._idle.pop()
            if not connection.open:
                continue
            await self._send(connection, request, exchange)
            if not connection.stale:
                return _judged(exchange)
            # The server closed an idle connection while we wrote: send again on a new one.
            exchange = Exchange(sent=exchange.sent)
        try:
            connection = await self._connect()
        except (OSError, TimeoutError) as error:
            exchange.fail(f"cannot connect ({str(error) or type(error).__name__})")
            return exchange
        await self._send(connection, request, exchange)
        return _judged(exchange)

    async def _send(self, connection: _Connection, request: bytes, exchange: Exchange) -> None:
        await connection.send(request, exchange, self._timeout)
        if connection.reusable:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            if self._address is None:  # resolved once, not for every connection
                found = await loop.getaddrinfo(
                    self._host, self._port, type=socket.SOCK_STREAM, family=socket.AF_UNSPEC
                )
                self._address = found[0][4][:2]  # type: ignore[assignment]
            host, port = cast("tuple[str, int]", self._address)
            _, connection = await loop.create_connection(
                _Connection,
                host,
                port,
                ssl=self._ssl,
                server_hostname=self._host if self._ssl is not None else None,
            )
        return connection


def _ssl_context(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _judged(exchange: Exchange) -> Exchange:
    """Note an error in the answer, unless there is one already."""
    if exchange.error or exchange.status == 0:
        exchange.fail("no answer")
    elif exchange.status != 200:
        exchange.fail(f"HTTP {exchange.status}: {error_text(bytes(exchange.body))}")
    elif exchange.unfinished:
        exchange.fail("the stream ended before its answer did")
    return exchange

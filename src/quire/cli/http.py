"""A small HTTP/1.1 client over asyncio for `quire chat --url` and `quire demo`.

It has no dependency, so that these commands start fast, and the times that the demo measures are those of
an HTTP client.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from quire.errors import ConfigError, QuireError
from quire.util.sse import SseParser

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 120.0
"""Timeout for a stream without data; servers send a comment line far more often."""
MAX_HEADER_LINES = 100
MAX_LINE_BYTES = 1 << 20
MAX_BODY_BYTES = 64 << 20


class HttpError(QuireError):
    """The server cannot be reached, refused, or broke off. `status` is 0 if it did not answer."""

    def __init__(self, message: str, *, status: int = 0, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class HttpClient:
    """Requests to one server. Each has its own connection: they are few and long."""

    url: str
    api_key: str | None = None

    async def get(self, path: str) -> bytes:
        """The body of a 2xx answer; otherwise `HttpError`."""
        async with self._exchange("GET", path, b"") as answer:
            return await answer.body()

    async def post_events(
        self, path: str, request: Mapping[str, object]
    ) -> AsyncIterator[dict[str, object]]:
        """The JSON objects of a server-sent event stream, until its `[DONE]`."""
        async with self._exchange("POST", path, json.dumps(request).encode()) as answer:
            async for data in _events(answer.pieces()):
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise _refusal(event, 200)
                yield event
        raise HttpError(f"{self.url}{path} broke off before its answer was complete.")

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[_Answer]:
        """Send one request and read the head of the answer; close the connection at the end."""
        place = urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ConfigError(
                f"url must begin with http:// or https:// and a host, got {self.url!r}."
            )
        secure = place.scheme == "https"
        head = self._head(method, place.path.rstrip("/") + path, place.netloc, len(body))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    place.hostname,
                    place.port or (443 if secure else 80),
                    ssl=ssl.create_default_context() if secure else None,
                    limit=MAX_LINE_BYTES,
                )
        except (OSError, TimeoutError) as error:
            raise HttpError(f"no server answers at {self.url} ({_reason(error)}).") from None
        try:
            writer.write(head + body)
            await writer.drain()
            answer = await _Answer.read_head(reader)
            if not 200 <= answer.status < 300:
                raise _refusal(await answer.body(), answer.status)
            yield answer
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise HttpError(f"the connection to {self.url} broke ({_reason(error)}).") from None
        finally:
            writer.close()

    def _head(self, method: str, target: str, host: str, length: int) -> bytes:
        lines = [
            f"{method} {target} HTTP/1.1",
            f"Host: {host.rpartition('@')[2]}",
            "Connection: close",
            "Accept: application/json, text/event-stream, text/plain",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        ]
        if self.api_key:
            if not self.api_key.isascii() or not self.api_key.isprintable():
                raise ConfigError("api_key must be printable ASCII.")
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass(slots=True)
class _Answer:
    """A response whose head has been read, but not its body."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader) -> _Answer:
        version, status, *_ = (await _line(reader)).split(" ", 2)
        if not version.startswith("HTTP/1.") or not status.isdigit():
            raise ValueError("the answer is not HTTP")
        headers: dict[str, str] = {}
        while line := await _line(reader):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
            if len(headers) > MAX_HEADER_LINES:
                raise ValueError("too many header lines")
        return cls(int(status), headers, reader)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it arrives."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await _line(self.reader)).partition(";")[0], 16):
                if size > MAX_BODY_BYTES:
                    raise ValueError("a chunk is too large")
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            return
        left = int(self.headers.get("content-length", MAX_BODY_BYTES))
        while left > 0 and (piece := await self.reader.read(min(left, 1 << 16))):
            left -= len(piece)
            yield piece

    async def body(self) -> bytes:
        parts = bytearray()
        async for piece in self.pieces():
            parts += piece
            if len(parts) > MAX_BODY_BYTES:
                raise ValueError("the body is too large")
        return bytes(parts)


async def _line(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(SILENCE_SECONDS):
        line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("closed by the server")
    return line.decode("latin-1").rstrip("\r\n")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The `data` of server-sent events."""
    parser = SseParser()
    async for piece in pieces:
        for data in parser.feed(piece):
            yield data.decode("utf-8", "replace")


def _refusal(answer: bytes | dict[str, object], status: int) -> HttpError:
    """The message of an error answer, in OpenAI's format or any other."""
    try:
        content = json.loads(answer) if isinstance(answer, bytes) else answer
        error = content["error"] if isinstance(content, dict) else None
    except (ValueError, KeyError):
        error = None
    if isinstance(error, dict):
        message, param = str(error.get("message")), error.get("param")
        return HttpError(message, status=status, param=str(param) if param else None)
    if isinstance(error, str):
        return HttpError(f"the server answered {status}: {error}", status=status)
    return HttpError(f"the server answered {status}.", status=status)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__

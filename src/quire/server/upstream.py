"""A small HTTP/1.1 client over asyncio: each request has its own connection, which ends with it.

It has no dependency, so that commands that use it start fast. When a caller leaves early or is cancelled,
the connection is closed, and a server of Quire's aborts the request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from quire.errors import ConfigError, QuireError

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 120.0
"""Timeout for a stream without data; servers send a comment line far more often."""
MAX_HEADER_LINES = 100
MAX_LINE_BYTES = 1 << 20
MAX_BODY_BYTES = 64 << 20
_IN_PATH = "%/:@!$&'()*+,;=~?[]"
"""May stay in a path and query. All else is encoded: a space or a line's end would change the request."""


class HttpError(QuireError):
    """The server cannot be reached, refused, or broke off. `status` is 0 if it did not answer."""

    def __init__(self, message: str, *, status: int = 0, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(slots=True)
class Answer:
    """A response whose head has been read, but not its body."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    reader: asyncio.StreamReader
    silence: float | None

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader, silence: float | None) -> Answer:
        answer = cls(0, {}, reader, silence)
        version, status, *_ = (await answer._line()).split(" ", 2)
        if not version.startswith("HTTP/1.") or not status.isdigit():
            raise ValueError("the answer is not HTTP")
        while line := await answer._line():
            name, _, value = line.partition(":")
            answer.headers[name.strip().lower()] = value.strip()
            if len(answer.headers) > MAX_HEADER_LINES:
                raise ValueError("too many header lines")
        answer.status = int(status)
        return answer

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it arrives. Of a chunked body, whole chunks."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._line()).partition(";")[0], 16):
                if size > MAX_BODY_BYTES:
                    raise ValueError("a chunk is too large")
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            return
        length = self.headers.get("content-length")
        left = MAX_BODY_BYTES if length is None else int(length)
        while left > 0 and (piece := await self.reader.read(min(left, 1 << 16))):
            left -= len(piece)
            yield piece
        if left > 0 and length is not None:
            raise EOFError("closed by the server")

    async def body(self) -> bytes:
        parts = bytearray()
        async for piece in self.pieces():
            parts += piece
            if len(parts) > MAX_BODY_BYTES:
                raise ValueError("the body is too large")
        return bytes(parts)

    async def _line(self) -> str:
        async with asyncio.timeout(self.silence):
            line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("closed by the server")
        return line.decode("latin-1").rstrip("\r\n")


def check_url(url: str) -> None:
    """Raises `ConfigError`."""
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ConfigError(f"url must begin with http:// or https:// and a host, got {url!r}.")


@asynccontextmanager
async def exchange(
    url: str,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    silence: float | None = SILENCE_SECONDS,
    connect: float = CONNECT_SECONDS,
) -> AsyncIterator[Answer]:
    """Send one request and read the head of the answer, of any status; close the connection at the end.

    headers: without those that belong to the connection. silence: seconds without data; None: no limit.
    Raises `HttpError`, also for what fails in the body of the `async with`.
    """
    check_url(url)
    place = urlsplit(url)
    secure = place.scheme == "https"
    lines = {
        "Host": place.netloc.rpartition("@")[2],
        "Connection": "close",
        **headers,
        "Content-Length": str(len(body)),
    }
    head = f"{method} {place.path.rstrip('/')}{quote(path, _IN_PATH)} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    try:
        async with asyncio.timeout(connect):
            reader, writer = await asyncio.open_connection(
                place.hostname,
                place.port or (443 if secure else 80),
                ssl=ssl.create_default_context() if secure else None,
                limit=MAX_LINE_BYTES,
            )
    except (OSError, TimeoutError) as error:
        raise HttpError(f"no server answers at {url} ({reason(error)}).") from None
    try:
        writer.write(head.encode("latin-1") + b"\r\n" + body)
        await writer.drain()
        yield await Answer.read_head(reader, silence)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        raise HttpError(f"the connection to {url} broke ({reason(error)}).") from None
    finally:
        writer.close()


def reason(error: BaseException) -> str:
    return str(error) or type(error).__name__

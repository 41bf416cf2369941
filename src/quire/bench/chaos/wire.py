"""One request on a connection of its own, and how it ended.

An answer is judged strictly: a stream has one finish reason per choice or one error, then `[DONE]`, then the
end of the response. Anything else is `BROKEN`, whatever text came before.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic
from typing import Any

import httptools
import msgspec

from quire.util.sse import SseParser

CONNECT_SECONDS = 10.0
MAX_ANSWER_BYTES = 8 << 20


class Kind(str, Enum):
    """How a request ended for its client."""

    ANSWER = "answer"
    ERROR = "error"
    """A typed error with status 5xx, or as the last event of a stream."""
    REFUSAL = "refusal"
    """408, 429 or 503 in the documented form."""
    REJECTED = "rejected"
    """A typed error with any other status 4xx."""
    UNREACHABLE = "unreachable"
    """No connection: nothing was sent."""
    DROPPED = "dropped"
    """The connection was closed without a byte of an answer."""
    BROKEN = "broken"
    """None of these: no answer, half of one, or more than one end."""
    STUCK = "stuck"
    """No end before the deadline."""


REFUSALS = (408, 429, 503)
MUST_SAY_WHEN = (429, 503)


@dataclass(frozen=True, slots=True)
class Choice:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


Answer = tuple[Choice, ...]
"""By index."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that can be sent any number of times."""

    name: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    stream: bool | None = False
    """None: either kind of answer will do."""

    def message(self, host: str) -> bytes:
        lines = {
            "Host": host,
            "Connection": "close",
            "Content-Type": "application/json",
            **self.headers,
            "Content-Length": str(len(self.body)),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        method = "POST" if self.body else "GET"
        return f"{method} {self.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + self.body


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended."""

    call: str
    kind: Kind
    status: int = 0
    detail: str = ""
    answer: Answer | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """A client that reads slowly, for a while."""

    size: int
    """Bytes per read."""
    pause: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"

    async def connect(
        self, *, receive_buffer: int = 0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """receive_buffer: bytes that may wait unread, in the system and here; 0 is the usual."""
        place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        place.setblocking(False)
        limit = 1 << 16
        if receive_buffer:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            limit = receive_buffer
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(place, (self.host, self.port))
                return await asyncio.open_connection(sock=place, limit=limit)
        except BaseException:
            place.close()
            raise


@dataclass(slots=True)
class Reply:
    """A response as it arrives: httptools' callbacks."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    is_complete: bool = False
    problem: str = ""
    _parser: Any = None

    def __post_init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        if self.is_complete and not self.problem:
            self.problem = f"{len(data)} bytes after the end of the response"
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.problem = self.problem or f"not HTTP ({error})"

    def on_message_begin(self) -> None:
        if self.is_complete:
            self.problem = "another response after the end of the response"

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > MAX_ANSWER_BYTES:
            self.problem = "the answer has no end"

    def on_message_complete(self) -> None:
        self.is_complete = True


async def ask(
    address: Address,
    call: Call,
    *,
    deadline: float,
    pace: Pace | None = None,
    reply: Reply | None = None,
) -> Outcome:
    """Send it, read the answer, judge it. Never raises for what the server does. reply: a new one, to be
    filled with what comes."""
    started = monotonic()
    reply = reply or Reply()
    reached = False
    try:
        async with asyncio.timeout(deadline):
            reader, writer = await address.connect(receive_buffer=4096 if pace else 0)
            reached = True
            try:
                writer.write(call.message(address.name))
                await writer.drain()
                await _read(reader, reply, pace)
            finally:
                writer.close()
    except TimeoutError:
        kind = Kind.STUCK if reached else Kind.UNREACHABLE
        detail = f"no end within {deadline:g} s; {len(reply.body)} bytes of status {reply.status}"
        return Outcome(call.name, kind, reply.status, detail, seconds=monotonic() - started)
    except OSError as error:
        if not reached:
            return Outcome(call.name, Kind.UNREACHABLE, detail=str(error))
        if reply.status and not reply.is_complete:
            reply.problem = reply.problem or f"the connection broke ({error})"
    return judge(call, reply, seconds=monotonic() - started)


async def _read(reader: asyncio.StreamReader, reply: Reply, pace: Pace | None) -> None:
    started = monotonic()
    while not reply.problem:
        slow = pace is not None and monotonic() - started < pace.seconds
        data = await reader.read(pace.size if pace and slow else 1 << 16)
        if not data:
            return
        reply.feed(data)
        if pace and slow:
            await asyncio.sleep(pace.pause)


def judge(call: Call, reply: Reply, *, seconds: float = 0.0) -> Outcome:
    """What the bytes that came mean."""

    def end(kind: Kind, detail: str = "", answer: Answer | None = None) -> Outcome:
        return Outcome(call.name, kind, reply.status, detail, answer, round(seconds, 3))

    if reply.problem:
        return end(Kind.BROKEN, reply.problem)
    if reply.status == 0:
        return end(Kind.DROPPED)
    if not reply.is_complete:
        return end(Kind.BROKEN, f"closed after {len(reply.body)} bytes of status {reply.status}")
    try:
        if reply.status == 200:
            stream = reply.headers.get("content-type", "").startswith("text/event-stream")
            if call.stream not in (None, stream):
                return end(Kind.BROKEN, "not the kind of answer that was asked for")
            if stream:
                error, answer = _streamed(bytes(reply.body))
                if error is not None:
                    return end(Kind.ERROR, error)
                return end(Kind.ANSWER, answer=answer)
            return end(Kind.ANSWER, answer=_whole(bytes(reply.body)))
        message = _error_message(msgspec.json.decode(bytes(reply.body)))
    except (ValueError, msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        return end(Kind.BROKEN, f"{error or type(error).__name__}: {bytes(reply.body[-200:])!r}")
    if reply.status in MUST_SAY_WHEN and "retry-after" not in reply.headers:
        return end(Kind.BROKEN, f"{reply.status} without Retry-After: {message}")
    if reply.status in REFUSALS:
        return end(Kind.REFUSAL, message)
    if reply.status >= 500:
        return end(Kind.ERROR, message)
    if reply.status >= 400:
        return end(Kind.REJECTED, message)
    return end(Kind.BROKEN, f"status {reply.status}")


def _error_message(content: Any) -> str:
    """The message of a typed error. Raises `ValueError` if it is none."""
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= set(error):
        raise ValueError("not a typed error")
    return str(error["message"])[:200]


def _streamed(body: bytes) -> tuple[str | None, Answer]:
    """(the error's message, the answer). Raises `ValueError` if the stream does not end exactly once."""
    parser = SseParser()
    events = parser.feed(body)
    if events.count(b"[DONE]") != 1 or events[-1] != b"[DONE]":
        raise ValueError(f"{events.count(b'[DONE]')} [DONE] in a stream")
    choices: dict[int, _Growing] = {}
    error = None
    for event in events[:-1]:
        chunk = msgspec.json.decode(event)
        if error is not None:
            raise ValueError("an event after an error")
        if chunk.get("error") is not None:
            error = _error_message(chunk)
            continue
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], _Growing()).add(choice)
    if error is not None:
        return error, ()
    return None, tuple(choices[index].finished() for index in sorted(choices))


def _whole(body: bytes) -> Answer:
    content = msgspec.json.decode(body)
    choices: dict[int, _Growing] = {}
    for choice in content["choices"]:
        choices.setdefault(choice["index"], _Growing()).add(choice)
    return tuple(choices[index].finished() for index in sorted(choices))


@dataclass(slots=True)
class _Growing:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: Mapping[str, Any]) -> None:
        if self.finish_reason is not None:
            raise ValueError("output after a finish reason")
        delta = choice.get("delta") or choice.get("message") or {}
        self.text += choice.get("text") or delta.get("content") or ""
        self.token_ids += choice.get("token_ids") or ()
        self.finish_reason = choice.get("finish_reason")

    def finished(self) -> Choice:
        if self.finish_reason is None:
            raise ValueError("no finish reason")
        return Choice(self.text, tuple(self.token_ids), self.finish_reason)

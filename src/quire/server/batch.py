"""OpenAI's batch files: one request a line, sent to the server's app in this process, without HTTP.

The app is the same as that of `quire serve`, and so are endpoints, checks and errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable
from http import HTTPStatus

import msgspec
from msgspec import Raw, Struct

from quire.errors import EngineDeadError
from quire.server.engine_protocol import ServingEngine
from quire.server.middleware import App, Message

URLS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
)  # fmt: skip


class Line(Struct):
    """A line of the input file."""

    custom_id: str
    url: str
    body: Raw
    method: str = "POST"


class _Streams(Struct):
    stream: bool | None = None


class Reply(Struct):
    status_code: int
    request_id: str
    body: Raw


class Result(Struct):
    """A line of the output file."""

    id: str
    """Depends only on the input's line: it is the same in every run of the batch."""
    custom_id: str | None = None
    response: Reply | None = None
    """None if the line was not a request."""
    error: dict[str, object] | None = None
    """The error, if there was one. It is also in the response's body, if there is a response."""


class _ErrorBody(Struct):
    error: dict[str, object] | None = None


class BadLineError(Exception):
    """A line that is not a request of a batch."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


async def run_batch(
    app: App,
    engine: ServingEngine,
    lines: Iterable[bytes],
    write: Callable[[Result], None],
    *,
    done: Container[str] = (),
    concurrency: int,
) -> None:
    """Answer every line except those in `done`, `concurrency` at a time; `write` gets results as they come.

    done: custom ids, and the `Result.id`s of lines that were not requests.
    However it ends, all finished results have been written. Raises `EngineDeadError`.
    """
    seen: set[str] = set()
    running: set[asyncio.Task[Result]] = set()
    try:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            name = f"batch_req_{number}"
            try:
                line = read_line(text, seen)
            except BadLineError as error:
                if name not in done:
                    reason: dict[str, object] = {"code": "invalid_line", "message": str(error)}
                    write(Result(name, error.custom_id, error=reason))
                continue
            seen.add(line.custom_id)
            if line.custom_id in done:
                continue
            running.add(asyncio.ensure_future(_answer(app, engine, name, line)))
            if len(running) >= concurrency:
                running = await _write_some(running, write)
        while running:
            running = await _write_some(running, write)
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, Result):
                write(result)


async def _write_some(
    running: set[asyncio.Task[Result]], write: Callable[[Result], None]
) -> set[asyncio.Task[Result]]:
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in [task for task in running if task.done()]:
        running.discard(task)
        write(task.result())
    return running


def read_line(text: bytes, seen: Container[str]) -> Line:
    """Raises `BadLineError`."""
    try:
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadLineError(f"The line is no batch request: {error}.") from None
    name, reason = line.custom_id, None
    if name in seen:
        reason = f"custom_id {name[:64]!r} was on an earlier line."
    elif line.method != "POST":
        reason = f"method must be POST, got {line.method[:16]!r}."
    elif line.url not in URLS:
        reason = f"url must be one of {', '.join(URLS)}; got {line.url[:64]!r}."
    elif _streams(line.body):
        reason = "A batch is not streamed; leave out stream."
    if reason is not None:
        raise BadLineError(reason, name)
    return line


def _streams(body: Raw) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streams).stream)
    except msgspec.DecodeError:
        return False  # the endpoint reports what is wrong


async def _answer(app: App, engine: ServingEngine, name: str, line: Line) -> Result:
    status, request_id, body = await ask(app, line.url, bytes(line.body))
    if engine.is_dead:
        raise EngineDeadError(engine.health(float("inf")).reason)
    error = None
    if not 200 <= status < 300:
        error = _error_of(body) or {"code": str(status), "message": HTTPStatus(status).phrase}
    return Result(name, line.custom_id, Reply(status, request_id, Raw(body or b"null")), error)


def _error_of(body: bytes) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.DecodeError:
        return None


async def ask(app: App, path: str, body: bytes) -> tuple[int, str, bytes]:
    """POST `body` as JSON: (status, X-Request-Id, the answer's body)."""
    status, request_id = 500, ""
    parts: list[bytes] = []
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:  # a second call waits for the client to disconnect, which it never does
            await asyncio.get_running_loop().create_future()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, request_id
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = dict(message["headers"])
            request_id = headers.get(b"x-request-id", b"").decode("ascii")
        else:
            parts.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    await app(scope, receive, send)
    return status, request_id, b"".join(parts)

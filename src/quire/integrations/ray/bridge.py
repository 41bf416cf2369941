"""ASGI over a stream: the ingress sends a request, a replica runs Quire's app on it, messages come back.

Nothing here knows Ray, so that all of it can be tested without a cluster.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from quire.server.errors import ApiError, speaks_anthropic
from quire.server.live import ClientGoneError, Receive
from quire.server.middleware import App, Message, Scope, Send, send_error
from quire.server.sse import DONE, error_event, named_event

logger = logging.getLogger(__name__)

SCOPE_FIELDS = ("type", "asgi", "http_version", "server", "client", "scheme", "root_path", "path", "raw_path",
                "query_string", "headers", "method")  # fmt: skip
"""What of a request's scope can be sent; servers add objects of their own."""
DISCONNECT_SECONDS = 5.0
"""Seconds for an app to end a request whose client has gone."""


def portable(scope: Scope) -> dict[str, Any]:
    return {name: scope[name] for name in SCOPE_FIELDS if name in scope}


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises `ClientGoneError` if the client disconnects before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def run_app(app: App, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
    """Run `app` on one request and yield what it sends: each time all messages since the last.

    Closing the generator, or cancelling the task that runs it, disconnects the client from the app.
    """
    sent: list[Message] = []
    more, gone = asyncio.Event(), asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        more.set()

    task = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(lambda _: more.set())
    try:
        while True:
            await more.wait()
            more.clear()
            messages, sent = sent, []
            if messages:
                yield messages
            elif task.done():
                break
            if task.done():
                more.set()
        task.result()
    finally:
        gone.set()
        if not task.done():  # it ends its request in the engine
            await asyncio.wait((task,), timeout=DISCONNECT_SECONDS)
            task.cancel()


Explain = Callable[[Exception], ApiError]


class Answer(Protocol):
    """What a replica sends: lists of ASGI messages. `cancel` ends its work."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> None: ...


class Forwarding:
    """One answer on its way from a replica to the client."""

    def __init__(self, answer: Answer, scope: Scope, send: Send, explain: Explain) -> None:
        """explain: the error that the client gets for an exception of `answer`, as a whole answer or, in a
        stream that has begun, as its last event."""
        self._answer = answer
        self._scope = scope
        self._send = send
        self._explain = explain
        self._headers: list[tuple[bytes, bytes]] | None = None
        self._complete = False
        self._left = False

    async def run(self, receive: Receive) -> None:
        """Until the answer is complete. If the client disconnects, or this task is cancelled, the answer is
        cancelled. The request's body must have been read."""
        work = asyncio.ensure_future(self._pump())
        watch = asyncio.ensure_future(self._gone(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if self._complete:  # a server reports the end of the connection then, too
                await asyncio.wait((work,), timeout=DISCONNECT_SECONDS)
            if work.done():
                work.result()
        finally:
            watch.cancel()
            if not work.done():
                self._left = True
                self._answer.cancel()
                work.cancel()
                await asyncio.wait((work,))

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _pump(self) -> None:
        try:
            async for messages in self._answer:
                for message in messages:
                    await self._pass_on(message)
        except Exception as error:
            if not (self._left or self._complete):
                await self._fail(self._explain(error))

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Serve's proxy adds the same header.
            message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            self._headers = message["headers"]
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def _fail(self, failure: ApiError) -> None:
        if self._headers is None:
            await send_error(failure, self._scope, self._send)
            return
        kind = dict(self._headers).get(b"content-type", b"")
        if kind.partition(b";")[0] != b"text/event-stream":
            raise failure  # the connection breaks: an incomplete body must not look complete
        end = last_event(failure, self._scope)
        await self._send({"type": "http.response.body", "body": end, "more_body": False})


def last_event(error: ApiError, scope: Mapping[str, Any]) -> bytes:
    """The end of a stream that cannot go on, as Quire's own server writes it."""
    if speaks_anthropic(scope):
        return named_event("error", error.body(scope))
    return error_event(error) + DONE


async def run_whole(app: App, scope: Scope, body: bytes) -> tuple[int, str, bytes]:
    """Run `app` on a request with a short answer. Returns its status, content type and body."""
    status, kind, parts = 500, "", []
    async with aclosing(run_app(app, scope, body)) as stream:
        async for messages in stream:
            for message in messages:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    kind = dict(message["headers"]).get(b"content-type", b"").decode("latin-1")
                parts.append(message.get("body", b""))
    return status, kind, b"".join(parts)


def merge_metrics(texts: Mapping[str, str]) -> str:
    """The replicas' metrics (Prometheus text) as one page, where every sample has the label `replica`."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in headers.setdefault(family, []):
                    headers[family].append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for name in headers for line in (*headers[name], *samples.get(name, ()))]
    return "".join(line + "\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'

"""ASGI over a stream, without Ray: every way that an answer can end."""

from __future__ import annotations

import asyncio
import json

import pytest

from quire.integrations.ray.bridge import (
    Forwarding,
    merge_metrics,
    portable,
    read_body,
    run_app,
    run_whole,
)
from quire.server.errors import unavailable
from quire.server.live import ClientGoneError

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "root_path": "",
    "headers": [],
}
SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"a")]


def start(headers=()):
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def part(body: bytes, more: bool = True):
    return {"type": "http.response.body", "body": body, "more_body": more}


class Answer:
    """Messages of a replica, then an error or the end; or it stays open."""

    def __init__(self, *batches, error: Exception | None = None, stays_open: bool = False) -> None:
        self.batches, self.error, self.stays_open = batches, error, stays_open
        self.cancelled = False

    async def __aiter__(self):
        for batch in self.batches:
            yield batch
        if self.error is not None:
            raise self.error
        if self.stays_open:
            await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


async def never():
    await asyncio.Event().wait()


async def disconnected():
    return {"type": "http.disconnect"}


async def forwarded(answer: Answer, receive=never, scope=SCOPE) -> list[dict]:
    sent = []

    async def send(message):
        sent.append(message)

    forwarding = Forwarding(
        answer, scope, send, lambda _: unavailable("The replica has died.", retry_after=1)
    )
    await forwarding.run(receive)
    return sent


async def test_an_app_gets_the_body_and_its_messages_come_in_order():
    async def app(scope, receive, send):
        body = await read_body(receive)
        await send(start())
        await send(part(body))
        await asyncio.sleep(0)
        await send(part(b"!", more=False))

    messages = [m async for batch in run_app(app, SCOPE, b"hello") for m in batch]
    assert messages == [start(), part(b"hello"), part(b"!", more=False)]
    assert await run_whole(app, SCOPE, b"hello") == (200, "", b"hello!")


async def test_an_app_is_told_of_a_disconnect():
    seen = []

    async def app(scope, receive, send):
        await read_body(receive)
        await send(start())
        seen.append(await receive())

    stream = run_app(app, SCOPE, b"")
    assert await anext(stream) == [start()]
    await stream.aclose()
    assert seen == [{"type": "http.disconnect"}]


async def test_an_apps_exception_is_raised_after_its_messages():
    async def app(scope, receive, send):
        await send(start())
        raise RuntimeError("broken")

    stream = run_app(app, SCOPE, b"")
    assert await anext(stream) == [start()]
    with pytest.raises(RuntimeError, match="broken"):
        await anext(stream)


async def test_the_body_comes_in_pieces_or_its_client_leaves():
    pieces = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request"}]

    async def receive():
        return pieces.pop(0) if pieces else await disconnected()

    assert await read_body(receive) == b"a"
    with pytest.raises(ClientGoneError):
        await read_body(receive)


async def test_an_answer_is_passed_on_without_the_header_that_serve_adds():
    answer = Answer([start(SSE)], [part(b"data: 1\n\n"), part(b"", more=False)])
    sent = await forwarded(answer)
    assert sent == [start(SSE[:1]), part(b"data: 1\n\n"), part(b"", more=False)]
    assert not answer.cancelled


async def test_a_disconnect_cancels_the_answer():
    answer = Answer([start(SSE)], stays_open=True)
    await forwarded(answer, disconnected)
    assert answer.cancelled


async def test_cancelling_the_request_cancels_the_answer():
    answer = Answer([start(SSE)], stays_open=True)
    task = asyncio.create_task(forwarded(answer))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled


async def test_the_end_of_the_connection_after_the_end_of_the_answer_is_no_disconnect():
    ended = asyncio.Event()

    class Late(Answer):
        async def __aiter__(self):
            yield [start(), part(b"all", more=False)]
            ended.set()
            await asyncio.sleep(0.01)

    async def receive():
        await ended.wait()
        return await disconnected()

    answer = Late()
    assert await forwarded(answer, receive) == [start(), part(b"all", more=False)]
    assert not answer.cancelled


async def test_a_replica_that_dies_first_is_a_503_with_openais_body():
    sent = await forwarded(Answer(error=RuntimeError()))
    assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["message"] == "The replica has died."


async def test_a_replica_that_dies_within_a_stream_is_its_last_event():
    sent = await forwarded(Answer([start(SSE), part(b"data: 1\n\n")], error=RuntimeError()))
    assert sent[-1]["more_body"] is False
    event, done = sent[-1]["body"].decode().split("\n\n")[:2]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503
    assert done == "data: [DONE]"


async def test_and_in_anthropics_dialect():
    scope = {**SCOPE, "path": "/v1/messages"}
    sent = await forwarded(Answer([start(SSE)], error=RuntimeError()), scope=scope)
    assert sent[-1]["body"].startswith(b'event: error\ndata: {"type":"error"')


async def test_a_replica_that_dies_within_a_body_breaks_the_connection():
    answer = Answer(
        [start([(b"content-type", b"application/json")]), part(b"{")], error=RuntimeError()
    )
    with pytest.raises(Exception, match="The replica has died"):
        await forwarded(answer)


def test_only_plain_fields_of_a_scope_are_sent():
    assert portable({**SCOPE, "app": object(), "state": {}, "extensions": {}}) == SCOPE


def test_metrics_of_replicas_are_one_page():
    help_line = "# HELP a About it.\n# TYPE a gauge\n"
    merged = merge_metrics({"x": help_line + 'a{b="c d"} 1.0\na 2.0\n', "y": help_line + "a 3.0\n"})
    assert merged == help_line + (
        'a{replica="x",b="c d"} 1.0\na{replica="x"} 2.0\na{replica="y"} 3.0\n'
    )

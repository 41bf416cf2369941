"""An answer is judged by its bytes: what ends other than once is not an answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from quire.bench.chaos.wire import Address, Call, Choice, Kind, Outcome, Reply, ask, judge

STREAM = Call("a", "/v1/completions", b"{}", {}, stream=True)
WHOLE = Call("a", "/v1/completions", b"{}", {}, stream=False)
ERROR = {"error": {"message": "no", "type": "Error", "param": None, "code": 500}}
DONE = "data: [DONE]\n\n"


def response(status: int, body: str, *, kind: str = "application/json", more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\n{more}content-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


def events(*chunks: object, done: str = DONE) -> bytes:
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + done
    return response(200, body, kind="text/event-stream; charset=utf-8")


def chunk(text: str, reason: str | None = None, index: int = 0, ids=(7,)) -> dict:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason, "token_ids": ids}]}


def judged(call: Call, data: bytes) -> Outcome:
    reply = Reply()
    reply.feed(data)
    return judge(call, reply)


def test_a_stream():
    outcome = judged(STREAM, events(chunk("a"), chunk("b", "stop"), {"choices": [], "usage": {}}))
    assert outcome.kind is Kind.ANSWER
    assert outcome.answer == (Choice("ab", (7, 7), "stop"),)


def test_two_choices_in_any_order():
    outcome = judged(STREAM, events(chunk("b", "stop", 1), chunk("a", "length", 0)))
    assert [choice.text for choice in outcome.answer or ()] == ["a", "b"]


def test_a_chat_stream():
    delta = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop", "token_ids": [1]}
    outcome = judged(STREAM, events({"choices": [delta]}))
    assert outcome.answer == (Choice("hi", (1,), "stop"),)


def test_a_whole_answer():
    body = json.dumps(chunk("ab", "length"))
    assert judged(WHOLE, response(200, body)).answer == (Choice("ab", (7,), "length"),)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("no finish reason", events(chunk("a"))),
        ("no DONE", events(chunk("a", "stop"), done="")),
        ("two DONE", events(chunk("a", "stop"), done=DONE + DONE)),
        ("an event after DONE", events(chunk("a", "stop"), done=DONE + "data: {}\n\n")),
        ("two finish reasons", events(chunk("a", "stop"), chunk("", "stop"))),
        ("output after the end", events(chunk("a", "stop"), chunk("b"))),
        ("an event after an error", events(ERROR, chunk("b", "stop"))),
        ("an error without a type", events({"error": {"message": "no"}})),
        ("half a response", events(chunk("a", "stop"))[:-5]),
        ("more than a response", events(chunk("a", "stop")) + b"HTTP/1.1 200 OK\r\n\r\n"),
        ("not a stream", response(200, json.dumps(chunk("a", "stop")))),
        ("not HTTP", b"\x00\x01\x02\r\n\r\n"),
        ("an error that is text", response(500, "oops")),
        ("a redirect", response(302, json.dumps(ERROR))),
        ("no Retry-After", response(429, json.dumps(ERROR))),
    ],
)
def test_what_is_broken(what, data):
    assert judged(STREAM, data).kind is Kind.BROKEN, what


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (events(chunk("a"), ERROR), Kind.ERROR),
        (response(500, json.dumps(ERROR)), Kind.ERROR),
        (response(429, json.dumps(ERROR), more="Retry-After: 1\r\n"), Kind.REFUSAL),
        (response(503, json.dumps(ERROR), more="retry-after: 1\r\n"), Kind.REFUSAL),
        (response(408, json.dumps(ERROR)), Kind.REFUSAL),
        (response(400, json.dumps(ERROR)), Kind.REJECTED),
    ],
)
def test_other_ends(data, kind):
    assert judged(STREAM, data).kind is kind


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("close", Kind.DROPPED),
        ("silence", Kind.STUCK),
        ("half", Kind.BROKEN),
        ("reset", Kind.BROKEN),
    ],
)
async def test_what_a_server_may_do_to_a_connection(behaviour, kind):
    silent = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if behaviour == "silence":
            await silent.wait()
        elif behaviour != "close":
            writer.write(events(chunk("a", "stop"))[:-9])
            await writer.drain()
        if behaviour == "reset":
            await asyncio.sleep(0.1)
            writer.transport.abort()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        address = Address(*server.sockets[0].getsockname())
        outcome = await ask(address, STREAM, deadline=0.5 if behaviour == "silence" else 30)
        silent.set()
    assert outcome.kind is kind


async def test_no_server():
    async with await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0) as server:
        address = Address(*server.sockets[0].getsockname())
    assert (await ask(address, STREAM, deadline=30)).kind is Kind.UNREACHABLE

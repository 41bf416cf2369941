"""The client against servers that work, refuse, lie and die: every request ends in one exchange."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from quire.bench.client import Exchange, HttpPool, error_text
from quire.bench.load import run_load
from quire.bench.null_server import NullOptions, serve_null
from quire.errors import ConfigError
from tests.bench.conftest import Handler, in_thread, read_request, rude_server

BODY = b'{"max_tokens":5}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def ask(url: str, count: int = 1, **options: object) -> list[Exchange]:
    async def main() -> list[Exchange]:
        pool = HttpPool(url, **options)  # type: ignore[arg-type]
        request = pool.prepare("/v1/completions", BODY)
        result = await run_load(pool, [request] * count, [0.0] * count, max_concurrency=4)
        pool.close()
        return result.exchanges

    return asyncio.run(main())


def answering(*answers: bytes, keep: bool = False) -> Handler:
    """Each connection gets the next answers in turn, then is closed."""
    waiting = list(answers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while waiting:
            await read_request(reader)
            if waiting:
                writer.write(waiting.pop(0))
                await writer.drain()
            if not keep:
                return

    return handle


def event(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(piece: str, end: str | None = None) -> bytes:
    return event(choices=[{"text": piece, "finish_reason": end}])


def chunked(payload: bytes, size: int = 1000) -> bytes:
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


DONE = b"data: [DONE]\n\n"


# --- servers that work ----------------------------------------------------------------------------


def test_the_null_server_many_times_over_few_connections(null_server: str) -> None:
    exchanges = ask(null_server, 200)
    assert [exchange.error for exchange in exchanges] == [""] * 200
    assert all(len(exchange.chunk_times) == 5 for exchange in exchanges)
    assert all(exchange.completion_tokens == 5 for exchange in exchanges)
    assert all(exchange.finish_reason == "length" for exchange in exchanges)


def test_times_are_in_order_and_after_the_server_wrote_them() -> None:
    options = NullOptions(chunks=4, interval=0.01, first=0.01, stamp=True)
    with in_thread(lambda ready: serve_null(options, on_ready=ready)) as url:
        (exchange,) = ask(url)
    written = [int(piece) * 1e-9 for piece in exchange.texts]
    assert exchange.sent < written[0]
    assert all(a < b for a, b in zip(written, exchange.chunk_times, strict=True))
    assert exchange.chunk_times == sorted(exchange.chunk_times)
    assert exchange.finished >= exchange.chunk_times[-1]


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000])
def test_how_the_bytes_are_cut_does_not_matter(size: int) -> None:
    payload = (
        event(choices=[{"delta": {"role": "assistant", "content": ""}}])
        + event(choices=[{"delta": {"reasoning_content": "hm "}}])
        + event(choices=[{"delta": {"content": "é"}}], error=None)
        + event(choices=[{"delta": {"tool_calls": [{"index": 0}]}}])
        + event(choices=[{"delta": {}, "finish_reason": "stop"}])
        + event(
            choices=[],
            usage={
                "prompt_tokens": 3,
                "completion_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        )
        + DONE
    )
    with rude_server(answering(chunked(payload, size))) as url:
        (exchange,) = ask(url)
    assert exchange.error == ""
    assert exchange.text == 'hm é[{"index":0}]'.replace(":0", ": 0")
    assert len(exchange.chunk_times) == 3  # neither the role nor the end is output
    assert (exchange.prompt_tokens, exchange.completion_tokens) == (3, 9)
    assert exchange.cached_tokens == 2


def test_a_stream_that_ends_with_its_connection() -> None:
    with rude_server(answering(HEAD + b"\r\n" + text("a") + text("b", "stop"))) as url:
        (exchange,) = ask(url)
    assert (exchange.error, exchange.text, exchange.completion_tokens) == ("", "ab", None)


def test_an_idle_connection_that_was_closed_is_replaced() -> None:
    whole = chunked(text("a", "stop") + DONE)
    with rude_server(answering(*[whole] * 6)) as url:
        exchanges = ask(url, 6)
    assert [exchange.error for exchange in exchanges] == [""] * 6


# --- servers that do not --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b'HTTP/1.1 429 No\r\nContent-Length: 29\r\n\r\n{"error":{"message":"later"}}', "HTTP 429: later"),
        (b"HTTP/1.1 500 No\r\n\r\n" + b"<h1>oops</h1>", "HTTP 500: <h1>oops</h1>"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not an event stream"),
        (chunked(text("a") + event(error={"message": "out of memory"}) + DONE), "out of memory"),
        (chunked(text("a")), "ended before its answer did"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + text("a"), "closed the connection"),
        (HEAD + b"Content-Length: 0\r\n\r\n", "ended before its answer did"),
        (chunked(b"data: {broken\n\n" + DONE), "not a completion chunk"),
        (chunked(event(choices=[{"text": 3}]) + DONE), "not a completion chunk"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"", "closed the connection"),
    ],
)  # fmt: skip
def test_a_failure_says_what_failed(answer: bytes, says: str) -> None:
    with rude_server(answering(answer)) as url:
        (exchange,) = ask(url)
    assert says in exchange.error


def test_nobody_there() -> None:
    with rude_server(answering()) as url:
        pass
    (exchange,) = ask(url)
    assert "cannot connect" in exchange.error and exchange.status == 0


def test_a_server_that_says_nothing_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    with rude_server(silent) as url:
        exchanges = ask(url, 2, timeout=0.05)
    assert all("no end within 0.05 s" in exchange.error for exchange in exchanges)


def test_one_failure_does_not_take_others_along() -> None:
    good, bad = chunked(text("a", "stop") + DONE), b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    with rude_server(answering(*[good, bad] * 5, keep=True)) as url:
        exchanges = ask(url, 10)
    assert sorted(exchange.error for exchange in exchanges) == [""] * 5 + ["HTTP 503: "] * 5


def test_what_cannot_be_a_header_or_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="X-A"):
        HttpPool("http://h", headers={"X-A": "a\r\nX-B: b"})
    with pytest.raises(ConfigError, match="base_url"):
        HttpPool("h:8000")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error":{"message":"a\\nb"}}', "a b"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"message":"m"}', "m"),
        (b"plain", "plain"),
        (b"", ""),
    ],
)
def test_errors_in_any_shape_are_one_line(body: bytes, says: str) -> None:
    assert error_text(body) == says


def test_requests_leave_when_they_are_due(null_server: str) -> None:
    async def main() -> None:
        pool = HttpPool(null_server)
        request = pool.prepare("/v1/completions", BODY)
        seen: list[Exchange] = []
        done: Callable[[Exchange], None] = seen.append
        result = await run_load(pool, [request] * 4, [0, 0.02, 0.04, 0.06], on_done=done)
        pool.close()
        assert len(seen) == 4
        assert result.due == [result.start + at for at in (0, 0.02, 0.04, 0.06)]
        assert all(e.sent >= due for e, due in zip(result.exchanges, result.due, strict=True))
        assert result.duration >= 0.06

    asyncio.run(main())

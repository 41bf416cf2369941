"""The small HTTP client: streams however they are cut, refusals in words, no hang on a broken server."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from quire.cli.http import HttpClient
from quire.errors import ConfigError
from quire.server.upstream import HttpError


async def events_of(client: HttpClient) -> list[dict[str, object]]:
    return [event async for event in client.post_events("/v1/chat/completions", {"q": 1})]


async def test_a_stream_cut_anywhere_gives_its_events(scripted_server) -> None:
    scripted_server.answers = [["héllo ", "wörld", " 🎉\n"]]
    events = await events_of(HttpClient(scripted_server.url))
    text = [event["choices"][0]["delta"]["content"] for event in events]
    assert text == ["", "héllo ", "wörld", " 🎉\n"]
    assert scripted_server.requests == [{"q": 1}]


async def test_the_key_is_sent_and_host_carries_no_password(scripted_server) -> None:
    scripted_server.answers = [[]]
    await events_of(HttpClient(scripted_server.url.replace("//", "//user:pw@"), "sk-1"))
    assert scripted_server.headers[0]["authorization"] == "Bearer sk-1"
    assert "pw" not in scripted_server.headers[0]["host"]


async def test_a_key_cannot_smuggle_a_header(scripted_server) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        await HttpClient(scripted_server.url, "a\r\nX-Evil: 1").get("/v1/models")
    assert scripted_server.headers == []


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            b'{"error": {"message": "too long", "param": "input_tokens"}}',
            "too long",
            "input_tokens",
        ),
        (b'{"error": "Unauthorized"}', "the server answered 401: Unauthorized", None),
        (b'{"detail": "x"}', "the server answered 401.", None),
        (b"<html>", "the server answered 401.", None),
        (b"[1]", "the server answered 401.", None),
    ],
)
async def test_a_refusal_says_what_the_server_said(
    scripted_server, body: bytes, message: str, param: str | None
) -> None:
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" % len(body)
    scripted_server.answers = [head + body]
    with pytest.raises(HttpError) as caught:
        await events_of(HttpClient(scripted_server.url))
    assert (str(caught.value), caught.value.status, caught.value.param) == (message, 401, param)


async def test_an_error_inside_a_stream(scripted_server) -> None:
    event = json.dumps({"error": {"message": "engine died", "param": None}}).encode()
    scripted_server.answers = [b"HTTP/1.1 200 OK\r\n\r\ndata: " + event + b"\n\ndata: [DONE]\n\n"]
    with pytest.raises(HttpError, match="engine died"):
        await events_of(HttpClient(scripted_server.url))


async def test_a_stream_without_its_end_is_an_error(scripted_server) -> None:
    scripted_server.drop_before_done = True
    scripted_server.answers = [["half an ans"]]
    with pytest.raises(HttpError, match="broke off"):
        await events_of(HttpClient(scripted_server.url))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\x01\x02\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10 + b"".join(b"h%d: v\r\n" % i for i in range(200)),
        b"HTTP/1.1 200 OK\r\n\r\ndata: {not json\n\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * (2 << 20),
    ],
)
async def test_a_server_that_talks_nonsense(scripted_server, answer: bytes) -> None:
    scripted_server.answers = [answer]
    with pytest.raises(HttpError):
        await events_of(HttpClient(scripted_server.url))


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(HttpError, match=f"no server answers at http://127.0.0.1:{port}"):
        await HttpClient(f"http://127.0.0.1:{port}").get("/")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
async def test_an_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="url must begin with http"):
        await HttpClient(url).get("/")


async def test_a_path_in_the_url_is_kept(scripted_server) -> None:
    with pytest.raises(HttpError, match="404"):
        await HttpClient(scripted_server.url + "/base/").get("/v1/models")


async def test_leaving_a_stream_early_closes_the_connection(scripted_server) -> None:
    scripted_server.answers = [["a", "b", "c"]]
    stream = HttpClient(scripted_server.url).post_events("/v1/chat/completions", {})
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0)

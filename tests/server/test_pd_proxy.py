"""`quire pd-proxy` before scripted instances: who gets what, and what becomes of a request when one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest

from quire.config import ServerConfig
from quire.server import pd_upstreams
from quire.server.pd_proxy import PDProxy, ProxyOptions, serve_proxy
from quire.server.run import StopSignals

LONG = "word " * 400
"""About 500 tokens."""
PARAMS = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "ticket": "t"}
EVENTS = [b'data: {"n": %d}\n\n' % n for n in range(4)] + [b"data: [DONE]\n\n"]


@dataclass
class Instance:
    """A server whose answers a test decides."""

    mode: str = "ok"
    """ok | 503 | 400 | die (while it answers) | hang | no_params | null"""
    asked: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    left: int = 0
    """Connections that the other side closed before the answer was complete."""
    url: str = ""
    server: asyncio.Server | None = None
    after: int = 2
    """Events before it dies or hangs."""

    async def start(self, port: int = 0) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ValueError):
            self.left += 1
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split(" ")
        headers: dict[str, str] = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if path in ("/health", "/metrics"):
            return self._whole(writer, 503 if self.mode == "503" else 200, {})
        self.paths.append(f"{method} {path}")
        self.headers.append(headers)
        body = json.loads(raw) if raw[:1] == b"{" and raw[-1:] == b"}" else {}
        self.asked.append(body)
        if self.mode in ("503", "400"):
            return self._whole(writer, int(self.mode), {"error": {"message": "no"}})
        if self.mode == "hang" and not body.get("stream"):
            return await self._until_left(reader)
        if body.get("stream"):
            return await self._stream(reader, writer)
        answer: dict[str, object] = {"by": self.url}
        if body.get("kv_transfer_params", {}).get("do_remote_decode"):
            kinds = {"no_params": {}, "null": {"kv_transfer_params": None}}
            answer |= kinds.get(self.mode, {"kv_transfer_params": PARAMS})
        return self._whole(writer, 200, answer)

    async def _until_left(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self.left += 1

    def _whole(self, writer: asyncio.StreamWriter, status: int, answer: object) -> None:
        content = json.dumps(answer).encode()
        length = len(content) + (10 if self.mode == "die" else 0)
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        )
        writer.write(head.encode() + b"X-Own: 1\r\nConnection: close\r\n\r\n" + content)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        breaks = self.mode in ("die", "hang")
        for event in EVENTS[: self.after] if breaks else EVENTS:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        if self.mode == "die":
            writer.write(b"20\r\ndata: half an ev")
        elif self.mode == "hang":
            await writer.drain()
            await self._until_left(reader)
        else:
            writer.write(b"0\r\n\r\n")


@dataclass
class Site:
    client: httpx.AsyncClient
    prefill: list[Instance]
    decode: list[Instance]
    stop: StopSignals
    task: asyncio.Task[int]

    async def ask(self, path: str = "/v1/completions", **body: object) -> httpx.Response:
        return await self.client.post(path, json={"prompt": LONG, **body})

    async def count(self, name: str, **labels: str) -> float:
        page = (await self.client.get("/metrics")).text
        given = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        line = f"{name}{{{given}}} " if given else f"{name} "
        return next((float(x.split()[-1]) for x in page.splitlines() if x.startswith(line)), 0.0)

    def asked(self) -> tuple[int, int]:
        return sum(len(p.asked) for p in self.prefill), sum(len(d.asked) for d in self.decode)


Make = Callable[..., "asyncio.Future[Site]"]


@pytest.fixture
async def make(monkeypatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(pd_upstreams, "CHECK_SECONDS", 0.1)
    sites: list[Site] = []

    async def make_site(prefill: int = 1, decode: int = 1, **options: object) -> Site:
        sides = [[Instance() for _ in range(count)] for count in (prefill, decode)]
        for instance in sides[0] + sides[1]:
            await instance.start()
        urls = [tuple(each.url for each in side) for side in sides]
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = StopSignals()
        door = {
            name: options.pop(name) for name in ("max_body_bytes", "drain_delay") if name in options
        }
        config = ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=5, **door)
        serving = serve_proxy(
            ProxyOptions(*urls, **options), config, announce=ready.set_result, stop=stop
        )
        task = asyncio.ensure_future(serving)
        client = httpx.AsyncClient(base_url=await ready, timeout=30)
        sites.append(Site(client, *sides, stop, task))
        return sites[-1]

    yield make_site
    for site in sites:
        site.stop.hit()
        assert await asyncio.wait_for(site.task, 20) == 0
        await site.client.aclose()
        for instance in site.prefill + site.decode:
            await instance.stop()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_path_is_passed_on_as_it_was_sent(make):
    site = await make()
    path = "/v1/models/a%20b%0d%0aX-Evil:%201/%E2%82%AC?q=%20"
    assert (await site.client.get(path)).json() == {"by": site.decode[0].url}
    assert site.decode[0].paths == [f"GET {path}"]
    assert "x-evil" not in site.decode[0].headers[0]
    assert (await site.client.get("/health")).json()["status"] == "ok"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/completions"])
async def test_clients_say_nothing_of_kv(make, path):
    site = await make()
    await site.ask(path, kv_transfer_params={"do_remote_decode": True}, max_tokens=0)
    assert site.decode[0].asked == [{"prompt": LONG, "max_tokens": 0}]


async def test_p_computes_the_prompt_and_d_gets_its_kv(make):
    site = await make()
    fields = {
        "temperature": 0.5,
        "max_tokens": 50,
        "min_tokens": 7,
        "seed": 3,
        "n": 2,
        "logprobs": 1,
    }
    headers = {"authorization": "Bearer k", "x-request-id": "me-1"}
    response = await site.client.post(
        "/v1/completions?a=b", json={"prompt": LONG, **fields}, headers=headers
    )
    [p], [d] = site.prefill, site.decode
    assert response.json() == {"by": d.url}
    assert response.headers["x-own"] == "1"
    assert p.asked == [
        {
            "prompt": LONG, "temperature": 0.5, "seed": 3, "max_tokens": 1, "stream": False,
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
        }
    ]  # fmt: skip
    assert d.asked == [{"prompt": LONG, **fields, "kv_transfer_params": PARAMS}]
    assert d.paths == ["POST /v1/completions?a=b"]
    for each in (p, d):
        assert each.headers[0]["authorization"] == "Bearer k"
        assert each.headers[0]["x-request-id"] == "me-1"
    assert await site.count("quire:pd_requests_total", way="prefill", reason="long") == 1


async def test_a_stream_passes_through(make):
    site = await make()
    messages = [{"role": "user", "content": LONG}]
    body = {"messages": messages, "stream": True, "max_tokens": None, "tools": []}
    response = await site.client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content == b"".join(EVENTS)
    [p], [d] = site.prefill, site.decode
    assert p.asked[0]["max_completion_tokens"] == 1 and p.asked[0]["stream"] is False
    assert "max_tokens" not in p.asked[0]
    assert d.asked[0]["stream"] is True and d.asked[0]["kv_transfer_params"] == PARAMS
    assert len(d.headers[0]["x-request-id"]) == 32 == len(p.headers[0]["x-request-id"])


async def test_what_d_has_already_needs_no_p(make):
    site = await make()
    await site.ask()
    await site.ask(prompt=LONG + "more")
    assert site.asked() == (1, 2)
    await site.ask(cache_salt="x")
    await site.ask(model="other")
    assert site.asked() == (3, 4)
    await site.ask(prompt=LONG + "new " * 300)
    assert site.asked() == (4, 5)
    await site.ask(prompt="short")
    assert site.asked() == (4, 6)
    assert await site.count("quire:pd_requests_total", way="decode", reason="short") == 2


async def test_prompts_of_token_ids(make):
    site = await make()
    await site.ask(prompt=list(range(300)))
    await site.ask(prompt=list(range(310)))
    await site.ask(prompt=list(range(100, 200)))
    assert site.asked() == (1, 3)


async def test_the_threshold(make):
    site = await make(threshold=0)
    await site.ask(prompt="short")
    assert site.asked() == (1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [LONG, LONG]},
        {"prompt": [[1] * 500, [2] * 500]},
        {"use_beam_search": True},
        {"prompt_logprobs": 0},
        {"echo": True, "logprobs": 1},
        {"max_tokens": 0, "echo": True},
        {"skip_reading_prefix_cache": True},
        {"prompt": {"no": "prompt"}},
    ],
)
async def test_d_alone_where_it_has_to_compute_the_prompt_anyway(make, fields):
    site = await make(threshold=0)
    expected = 1 if isinstance(fields.get("prompt"), dict) else 0
    assert (await site.ask(**fields)).status_code == 200
    assert site.asked() == (expected, 1)  # what nobody understands may go anywhere


@pytest.mark.parametrize("mode", ["503", "400", "die", "hang", "no_params", "null", "gone"])
async def test_when_p_fails_d_computes_the_prompt(make, mode):
    site = await make(prefill_timeout=0.3)
    [p], [d] = site.prefill, site.decode
    if mode == "gone":
        await p.stop()
    p.mode = mode
    response = await site.ask(kv_transfer_params={"do_remote_prefill": True, "remote_host": "evil"})
    assert response.json() == {"by": d.url}
    assert d.asked == [{"prompt": LONG}]
    if mode == "hang":
        await eventually(lambda: p.left == 1)
    page = (await site.client.get("/metrics")).text
    assert 'way="decode"' in page


async def test_a_p_that_is_down_is_not_asked_and_one_that_comes_back_is(make):
    site = await make()
    [p], [d] = site.prefill, site.decode
    port = int(p.url.rpartition(":")[2])
    await p.stop()
    for number in range(3):
        assert (await site.ask(prompt=f"{number}{LONG}")).status_code == 200
    await eventually(lambda: site.asked()[1] == 3)
    assert site.asked()[0] == 0
    health = await site.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    await p.start(port)
    async with asyncio.timeout(10):
        while (await site.client.get("/health")).json()["status"] != "ok":
            await asyncio.sleep(0.02)
    await site.ask(prompt="back" + LONG)
    assert len(p.asked) == 1
    assert d.asked[-1]["kv_transfer_params"] == PARAMS


async def test_load_is_spread_and_prefixes_stay(make):
    site = await make(prefill=2, decode=2)
    for number in range(8):
        await site.ask(prompt=f"{number}{LONG}")
    assert all(2 <= len(each.asked) <= 6 for each in site.prefill + site.decode)
    before = [len(d.asked) for d in site.decode]
    where = [d for d in site.decode if any(a["prompt"][0] == "0" for a in d.asked)]
    for number in range(3):
        await site.ask(prompt=f"0{LONG}{number}")
    after = [len(d.asked) for d in site.decode]
    [grown] = [d for d, a, b in zip(site.decode, before, after, strict=True) if b > a]
    assert grown is where[0]


@pytest.mark.parametrize("mode", ["503", "die", "gone"])
async def test_another_d_answers_while_the_client_has_nothing(make, mode):
    site = await make(decode=2, prefill=0)
    bad, good = site.decode
    bad.mode = mode
    if mode == "gone":
        await bad.stop()
    for number in range(6):
        response = await site.ask(prompt=f"{number}{LONG}")
        assert response.json() == {"by": good.url}
    assert len(good.asked) == 6


async def test_a_stream_that_breaks_ends_once_and_is_not_repeated(make):
    site = await make(decode=2, prefill=0)
    for d in site.decode:
        d.mode = "die"
    response = await site.ask(stream=True)
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[:2] == ['data: {"n": 0}', 'data: {"n": 1}']
    assert json.loads(lines[2].removeprefix("data: "))["error"]["code"] == 503
    assert lines[3:] == ["data: [DONE]"]
    assert site.asked() == (0, 1)
    assert await site.count("quire:pd_broken_streams_total") == 1


async def test_a_stream_that_breaks_before_its_first_event_is_asked_for_again(make):
    site = await make(decode=2, prefill=0)
    for d in site.decode:
        d.mode, d.after = "die", 0
    assert (await site.ask(stream=True)).status_code == 503
    assert [len(d.asked) for d in site.decode] == [1, 1]
    assert await site.count("quire:pd_retries_total") == 1


def test_no_instance_is_up_before_its_first_check() -> None:
    proxy = PDProxy(ProxyOptions(("http://127.0.0.1:1",), ("http://127.0.0.1:2",)))
    status, body = proxy.health()
    assert (status, json.loads(body)["status"]) == (503, "down")


async def test_no_decode_instance(make):
    site = await make()
    await site.decode[0].stop()
    response = await site.ask()
    assert response.status_code == 503 and response.headers["retry-after"] == "2"
    assert "No decode instance" in response.json()["error"]["message"]
    health = await site.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "down")


@pytest.mark.parametrize("where", ["p", "d", "stream"])
async def test_a_client_that_leaves_ends_both(make, where):
    site = await make()
    [p], [d] = site.prefill, site.decode
    instance = p if where == "p" else d
    instance.mode = "hang"
    asking = asyncio.ensure_future(site.ask(stream=where == "stream"))
    await eventually(lambda: len(instance.asked) == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: instance.left == 1)
    assert site.asked() == (1, 0 if where == "p" else 1)
    load = await site.count("quire:pd_upstream_load_tokens", role="decode", url=d.url)
    assert load == 0


async def test_everything_else_passes_through(make):
    site = await make()
    [p], [d] = site.prefill, site.decode
    assert (await site.client.get("/v1/models")).json() == {"by": d.url}
    await site.client.post("/tokenize", json={"prompt": LONG})
    await site.client.post("/v1/embeddings?x=1", json={"input": LONG})
    await site.client.post("/v1/completions", content=b"{broken", headers={"content-type": "a/b"})
    await site.client.head("/v1/models")
    await site.client.delete("/v1/responses/resp_1")
    assert p.asked == []
    assert d.paths == [
        "GET /v1/models", "POST /tokenize", "POST /v1/embeddings?x=1", "POST /v1/completions",
        "HEAD /v1/models", "DELETE /v1/responses/resp_1",
    ]  # fmt: skip
    assert d.headers[3]["content-type"] == "a/b" and d.headers[3]["content-length"] == "7"


async def test_a_path_cannot_become_a_request_of_its_own(make):
    site = await make()
    [d] = site.decode
    forged = "/v1/models%20HTTP/1.1%0D%0AX-Forged%3A%20yes%0D%0A%0D%0A?a=1"
    await site.client.get(forged)
    assert d.paths == [f"GET {forged}"] and "x-forged" not in d.headers[0]


async def test_a_body_that_is_too_large(make):
    site = await make(max_body_bytes=1000)
    assert (await site.ask()).status_code == 413
    assert site.asked() == (0, 0)


async def test_a_drain_lets_requests_finish(make):
    site = await make()
    d = site.decode[0]
    d.mode = "hang"
    asking = asyncio.ensure_future(site.ask(prompt="short", stream=True))
    await eventually(lambda: len(d.asked) == 1)
    site.stop.hit()
    await asyncio.sleep(0.05)
    assert not asking.done()
    await d.stop()  # nothing else ends it
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert await asyncio.wait_for(asyncio.shield(site.task), 10) == 0


async def test_requests_are_served_until_everyone_has_noticed_a_drain(make):
    site = await make(drain_delay=60.0)
    site.stop.hit()
    async with asyncio.timeout(10):
        while (await site.client.get("/health")).status_code != 503:
            await asyncio.sleep(0.01)
    answer = await site.ask()
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    site.stop.hit()
    assert await asyncio.wait_for(asyncio.shield(site.task), 10) == 0


def test_urls_are_checked() -> None:
    with pytest.raises(Exception, match="http://"):
        PDProxy(ProxyOptions((), ("localhost:8000",)))

"""Batch files over the app: every line is answered once, as over HTTP, and what was done is kept."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from scripted_engine import ScriptedEngine

from quire.config import ServerConfig
from quire.errors import EngineDeadError
from quire.server.app import build_app
from quire.server.batch import run_batch
from quire.server.state import ServerState


class Batch:
    """One run; `results` is what was written so far."""

    def __init__(self, engine: ScriptedEngine, **config: Any) -> None:
        self.engine = engine
        self.state = ServerState(replace(ServerConfig(), **config))
        self.state.engine_loaded(engine)
        self.results: list[dict[str, Any]] = []

    async def run(self, *lines: bytes | dict[str, Any], done=(), concurrency: int = 4) -> None:
        texts = [t if isinstance(t, bytes) else json.dumps(t).encode() for t in lines]
        write = lambda result: self.results.append(json.loads(msgspec.json.encode(result)))  # noqa: E731
        app = build_app(self.state)
        await run_batch(app, self.engine, texts, write, done=done, concurrency=concurrency)


@pytest.fixture
async def batch(engine: ScriptedEngine) -> Batch:
    return Batch(engine)


def line(custom_id: str, url: str = "/v1/completions", **body: object) -> dict[str, Any]:
    body = body or {"prompt": f"prompt {custom_id}"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


async def test_each_endpoint_answers_in_its_own_shape(batch: Batch) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await batch.run(
        line("1"),
        line("2", "/v1/chat/completions", **chat),
        line("3", "/v1/embeddings", input="a b"),
        line("4", "/v1/score", text_1="a b", text_2=["a b"]),
        line("5", "/rerank", query="a b", documents=["a b"]),
    )
    by_id = {result["custom_id"]: result for result in batch.results}
    assert set(by_id) == {"1", "2", "3", "4", "5"}
    for number, result in by_id.items():
        assert result["id"] == f"batch_req_{number}" and result["error"] is None
        assert result["response"]["status_code"] == 200 and result["response"]["request_id"]
    assert by_id["1"]["response"]["body"]["object"] == "text_completion"
    message = by_id["2"]["response"]["body"]["choices"][0]["message"]
    assert message["content"] == "Hello there, world!"
    assert len(by_id["3"]["response"]["body"]["data"][0]["embedding"]) == 8
    assert by_id["4"]["response"]["body"]["data"][0]["score"] == pytest.approx(1.0)


async def test_a_refused_request_is_a_result_with_the_servers_error(batch: Batch) -> None:
    await batch.run(line("1", prompt="x", n=-1), line("2"))
    bad = next(result for result in batch.results if result["custom_id"] == "1")
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"] == bad["error"]
    assert bad["error"]["param"] == "n"
    assert len(batch.results) == 2


async def test_the_servers_limits_hold(engine: ScriptedEngine) -> None:
    batch = Batch(engine, max_body_bytes=100, strict_requests=True)
    await batch.run(line("1", prompt="x" * 200), line("2", prompt="x", foo=1))
    assert sorted(r["response"]["status_code"] for r in batch.results) == [400, 413]


@pytest.mark.parametrize(
    ("text", "custom_id", "words"),
    [
        (b"no json", None, "no batch request"),
        (b"[1]", None, "no batch request"),
        (b'{"custom_id": "x", "url": "/v1/completions"}', None, "body"),
        (b'{"custom_id": 7, "url": "/v1/completions", "body": {}}', None, "custom_id"),
        (b"\xff\xfe", None, "no batch request"),
        (json.dumps(line("x", "/metrics")).encode(), "x", "url must be one of"),
        (json.dumps(line("x") | {"method": "GET"}).encode(), "x", "method must be POST"),
        (json.dumps(line("ok")).encode(), "ok", "on an earlier line"),
        (json.dumps(line("x", prompt="p", stream=True)).encode(), "x", "not streamed"),
    ],
)
async def test_a_bad_line_is_told_and_harms_no_other(
    batch: Batch, text: bytes, custom_id: str | None, words: str
) -> None:
    await batch.run(line("ok"), b"\n", text, line("after"))
    bad = next(result for result in batch.results if result["response"] is None)
    assert (bad["id"], bad["custom_id"]) == ("batch_req_3", custom_id)
    assert words in bad["error"]["message"]
    good = {r["custom_id"] for r in batch.results if r["response"]}
    assert good == {"ok", "after"}


async def test_what_is_done_is_not_asked_again(batch: Batch) -> None:
    await batch.run(line("1"), b"junk", line("2"), b"junk", done={"1", "batch_req_2"})
    assert {result["id"] for result in batch.results} == {"batch_req_3", "batch_req_4"}
    assert len(batch.engine.submitted) == 1


async def test_the_engine_is_kept_full_and_not_overfull(batch: Batch) -> None:
    batch.engine.hold()
    run = asyncio.ensure_future(batch.run(*(line(str(n)) for n in range(10)), concurrency=3))
    while len(batch.engine.submitted) < 3:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(batch.engine.submitted) == 3
    batch.engine.release()
    await run
    assert len(batch.results) == 10


async def test_an_interrupted_run_keeps_what_was_answered(batch: Batch) -> None:
    def read():
        for number in range(3):
            yield json.dumps(line(str(number))).encode()
        batch.engine.hold()
        for number in range(3, 9):
            yield json.dumps(line(str(number))).encode()

    app = build_app(batch.state)
    write = batch.results.append
    run = asyncio.ensure_future(run_batch(app, batch.engine, read(), write, concurrency=3))
    while len(batch.engine.submitted) < 6:
        await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(result.custom_id for result in batch.results) == ["0", "1", "2"]
    assert all(stream.ended for stream in batch.engine.streams), "the engine still computes"
    assert not len(batch.state.live)


async def test_an_answer_that_comes_as_the_run_is_interrupted_is_kept(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(app, path, body):
        run.cancel()
        return 200, "r", b"{}"

    monkeypatch.setattr("quire.server.batch.ask", ask)
    run = asyncio.ensure_future(batch.run(line("1")))
    with pytest.raises(asyncio.CancelledError):
        await run
    assert [result["custom_id"] for result in batch.results] == ["1"]


async def test_a_dead_engine_ends_the_run_and_fails_no_line(batch: Batch) -> None:
    batch.engine.die("core exited")
    with pytest.raises(EngineDeadError, match="core exited"):
        await batch.run(line("1"), line("2"))
    assert batch.results == []

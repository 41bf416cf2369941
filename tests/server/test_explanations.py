"""Explanations and timelines over HTTP, the header with the engine's ids, and slow requests in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.scheduler.observed import Observed
from tests.scheduler.trace_rules import check_trace

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.server import explanations
from quire.server.app import build_admin_app, build_app

COMPLETIONS = "/v1/completions"
ID = "x-quire-request-id"


def record(*requests: int) -> bytes:
    engine = Observed(seats=1)
    for request_id in requests:
        engine.add(request_id, 4)
    engine.drain()
    return engine.record.dump()


@pytest.fixture
def kept(engine: ScriptedEngine) -> ScriptedEngine:
    """Two replicas."""
    engine.kept_records = [record(1, 3), record(2, 4)]
    return engine


# --- the header -------------------------------------------------------------------------------------


async def test_answers_name_the_engines_ids(make_client, engine):
    client = make_client()

    async def ids_of(path: str, **body: object) -> str | None:
        return (await client.post(path, json=body)).headers.get(ID)

    assert await ids_of(COMPLETIONS, prompt="x") == "r1"
    assert await ids_of(COMPLETIONS, prompt=["x", "y"], n=2) == "r2, r3, r4, r5"
    assert await ids_of(COMPLETIONS, prompt="x", stream=True) == "r6"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert await ids_of("/v1/chat/completions", **chat) == "r7"
    assert await ids_of("/v1/chat/completions", **chat, stream=True) == "r8"
    assert await ids_of("/v1/messages", **chat, max_tokens=3) == "r9"
    assert await ids_of("/v1/responses", input="x") == "r10"
    assert await ids_of("/v1/responses", input="x", stream=True) == "r11"
    assert await ids_of("/v1/embeddings", input=["x", "y"]) == "r12, r13"
    assert await ids_of(COMPLETIONS, prompt="x", n="many") is None
    assert (await client.get("/v1/models")).headers.get(ID) is None
    many = await ids_of(COMPLETIONS, prompt=["x"] * 70)
    assert many is not None and many.startswith("r14, ") and many.endswith("r77, ...")


# --- the endpoints ----------------------------------------------------------------------------------


async def test_a_request_is_found_by_any_of_its_ids(make_client, kept):
    client = make_client(enable_admin_endpoints=True)
    answers = [
        await client.post(
            COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": f"mine-{i % 2}"}
        )
        for i in range(3)
    ]
    for name in ("r1", "1", answers[0].json()["id"]):
        found = (await client.get(f"/debug/requests/{name}")).json()["requests"]
        assert [(each["id"], each["replica"]) for each in found] == [("r1", 0)]
        assert found[0]["explanation"][0].startswith("r1 arrived at ")
        assert found[0]["facts"]["finish_reason"] == "length"
    found = (await client.get("/debug/requests/mine-0")).json()["requests"]
    assert [each["id"] for each in found] == ["r1", "r3"], "an id may come twice"
    assert "for a sequence slot" in found[1]["explanation"][1]
    assert [
        (each["id"], each["replica"])
        for each in (await client.get("/debug/requests/mine-1")).json()["requests"]
    ] == [("r2", 1)]
    # Ours come first: clients may choose any id.
    await client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "r1"})
    found = (await client.get("/debug/requests/r1")).json()["requests"]
    assert [each["id"] for each in found] == ["r1", "r4"]
    assert client.state.explanations.ids_of("r1") == [1, 4], "also within one replica"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    answer = (await client.post("/v1/chat/completions", json=chat)).json()
    assert client.state.explanations.ids_of(answer["id"]) == [5]


async def test_an_id_that_comes_often_is_bounded() -> None:
    known = explanations.Explanations(ServerConfig())
    known._known += [explanations.Known("same", "", (number,)) for number in range(1000)]
    assert known.ids_of("same") == list(range(1000 - explanations.MOST_EXPLAINED, 1000))


async def test_a_slow_stream_is_explained_in_the_log(make_client, kept, caplog):
    caplog.set_level("WARNING", "quire")
    client = make_client(slow_request_seconds=0.0)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n")
    async with asyncio.timeout(30):
        while client.state.explanations._tasks:
            await asyncio.sleep(0)
    (line,) = slow_lines(caplog)
    assert line.engine_ids == ["r1"] and line.explanation[0].startswith("r1 arrived at ")


async def test_what_is_not_there_says_why(make_client, kept):
    client = make_client(enable_admin_endpoints=True)
    answer = await client.get("/debug/requests/r99")
    assert answer.status_code == 404
    assert "has nothing of r99" in answer.json()["error"]["message"]
    answer = await client.get("/debug/requests/nobody")
    assert answer.status_code == 404 and "last 16384 requests" in answer.json()["error"]["message"]
    kept.kept_records = []
    answer = await client.get("/debug/requests/r1")
    assert answer.status_code == 404 and "--decision-record-bytes" in answer.text
    assert (
        await make_client(loaded=False, enable_admin_endpoints=True).get("/debug/requests/r1")
    ).status_code == 503


async def test_the_summary_and_the_timeline(make_client, kept):
    client = make_client(enable_admin_endpoints=True)
    found = (await client.get("/debug/requests")).json()
    assert {each["id"] for each in found["requests"]} == {"r1", "r2", "r3", "r4"}
    assert found["requests"][0]["id"] in ("r3", "r4")
    slots = [each for each in found["reasons"] if each["reason"] == "no sequence slot"]
    assert [(each["replica"], each["requests"]) for each in slots] == [(0, 1), (1, 1)]
    trace = (await client.get("/debug/timeline")).json()
    check_trace(trace)
    assert {event["pid"] for event in trace["traceEvents"]} == {1, 2}
    last = (await client.get("/debug/timeline?seconds=0.02")).json()
    assert len(last["traceEvents"]) < len(trace["traceEvents"])
    for wrong in ("0", "-1", "nan", "inf", "x", ""):
        assert (await client.get(f"/debug/timeline?seconds={wrong}")).status_code == 400


async def test_only_operators_may_ask(make_client, kept):
    client = make_client(enable_admin_endpoints=True)
    paths = ("/debug/requests", "/debug/requests/r1", "/debug/timeline")
    app = build_app(client.state, api_keys=("k",), admin_keys=("adm",))
    client._transport.app = app
    for path in paths:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"authorization": "Bearer k"})).status_code == 401
        assert (await client.get(path, headers={"authorization": "Bearer adm"})).status_code == 200
    plain = make_client()
    client._transport.app = build_admin_app(plain.state, admin_keys=("adm",))
    for path in paths:
        assert (await plain.get(path)).status_code == 403, "it is not from this machine"
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"authorization": "Bearer adm"})).status_code == 200


# --- slow requests ----------------------------------------------------------------------------------


def slow_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [each for each in caplog.records if each.getMessage().startswith("slow request ")]


async def ask(client, **headers: str) -> None:
    await client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
    async with asyncio.timeout(30):
        while client.state.explanations._tasks:
            await asyncio.sleep(0)


async def test_slow_requests_are_explained_in_the_log_but_not_too_often(
    make_client, kept, caplog, monkeypatch
):
    caplog.set_level("WARNING", "quire")
    await ask(make_client())
    await ask(make_client(slow_request_seconds=1e6))
    assert not slow_lines(caplog)
    kept.num_sequences = 0
    client = make_client(slow_request_seconds=0.0)
    await ask(client, **{"x-request-id": "mine"})
    await ask(client)
    await ask(client)
    (line,) = slow_lines(caplog)
    assert line.getMessage().startswith("slow request mine: ended after ")
    assert " s (limit 0 s). r1 arrived at " in line.getMessage()
    assert line.engine_ids == ["r1"] and line.request_id == "mine" and line.not_logged == 0
    assert line.explanation[0].startswith("r1 arrived at ")
    json.dumps(line.explanation)
    monkeypatch.setattr(explanations, "LOG_SECONDS", 0.0)
    await ask(client)
    assert slow_lines(caplog)[1].not_logged == 2
    assert "(2 other slow requests were not logged)" in slow_lines(caplog)[1].getMessage()


async def test_what_is_slow(make_client, kept, caplog):
    from quire.outputs import RequestStateStats
    from quire.server.record import Record, Work

    class Stream:
        sequence_ids = (1,)

        class last:
            outputs = ()
            num_cached_tokens = 0
            metrics = RequestStateStats(
                num_generation_tokens=11, arrival_ts=1.0, queued_ts=1.0, scheduled_ts=1.5,
                first_token_ts=2.0, last_token_ts=3.0,
            )  # fmt: skip

    found = Record(arrival_ts=1.0, ended_ts=3.5, route=COMPLETIONS, work=[Work(Stream(), 4)])

    def why(**limits: float) -> str | None:
        return explanations.Explanations(ServerConfig(**limits)).why_slow(found)

    assert why() is None
    assert why(slow_request_ttft=0.9) == "first token after 1 s (limit 0.9 s)"
    assert why(slow_request_ttft=1.1) is None
    assert why(slow_request_itl=99) == "time between tokens 100 ms (limit 99 ms)"
    assert why(slow_request_itl=101) is None
    assert why(slow_request_seconds=2) == "ended after 2.5 s (limit 2 s)"
    found.route = "/tokenize"
    assert why(slow_request_seconds=2) is None
    with pytest.raises(ConfigError, match="slow_request_itl must be at least 0"):
        ServerConfig(slow_request_itl=-1.0)


async def test_an_engine_that_fails_meanwhile_is_logged(make_client, kept, caplog):
    kept.kept_records = [b"nonsense"]
    await ask(make_client(slow_request_seconds=0.0))
    (line,) = slow_lines(caplog)
    assert "; not explained: " in line.getMessage()

"""The line of each finished request, and the load header."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import queue_full

from quire.config import ServerConfig
from quire.messages import LoadStats, SchedulerStats
from quire.outputs import RequestOutput, RequestStateStats
from quire.server.app import build_app
from quire.server.record import GENERATING, Record, Work
from quire.server.request_log import facts
from quire.server.state import ServerState
from quire.util.logging import setup_logging

FIELDS = {
    "request_id", "answer_id", "engine_ids", "trace_id", "tenant", "key", "endpoint", "model", "stream",
    "status", "finish_reason", "num_prompts", "prompt_tokens", "cached_tokens", "output_tokens",
    "num_preemptions", "queue_seconds", "first_token_seconds", "prefill_seconds", "decode_seconds",
    "e2e_seconds",
}  # fmt: skip
BASE = {"time", "level", "logger", "message"}
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Log:
    def __init__(self, form: str) -> None:
        self.stream = io.StringIO()
        setup_logging(log_format=form, stream=self.stream)

    def entries(self) -> list[dict]:
        found = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [entry for entry in found if entry["logger"] == "quire.server.request_log"]


@pytest.fixture
def log():
    names = ("quire", "uvicorn.error", "uvicorn.access")
    before = [(logging.getLogger(n), logging.getLogger(n).handlers[:]) for n in names]
    level, propagates = logging.getLogger("quire").level, logging.getLogger("quire").propagate
    yield Log
    for logger, handlers in before:
        logger.handlers[:] = handlers
    logging.getLogger("quire").setLevel(level)
    logging.getLogger("quire").propagate = propagates


async def test_one_line_for_each(log, make_client, engine) -> None:
    out = log("json")
    client = make_client(request_log=True, api_keys=("k1",))
    headers = {
        "authorization": "Bearer k1", "x-request-id": "mine",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
    }  # fmt: skip
    body = {"prompt": "SECRET words", "max_tokens": 4, "user": "SECRET"}
    await client.post("/v1/completions", json=body, headers=headers)
    [entry] = out.entries()
    assert entry.keys() == FIELDS | BASE
    digest = hashlib.sha256(b"k1").hexdigest()[:16]
    for name, value in {
        "request_id": "mine", "trace_id": TRACE, "tenant": f"key-{digest}", "key": digest, "model": "tiny",
        "endpoint": "/v1/completions", "status": 200, "finish_reason": "stop", "stream": False,
        "num_prompts": 1, "prompt_tokens": 3, "cached_tokens": 2, "level": "info",
    }.items():  # fmt: skip
        assert entry[name] == value, name
    assert entry["answer_id"].startswith("cmpl-") and entry["e2e_seconds"] > 0
    assert "SECRET" not in out.stream.getvalue() and "Hello" not in out.stream.getvalue()


async def test_it_is_off_unless_asked_for(log, client) -> None:
    out = log("json")
    await client.post("/v1/completions", json={"prompt": "hi"})
    assert not out.entries()


async def test_refused_and_failed_requests_have_one_too(log, make_client, engine) -> None:
    out = log("json")
    client = make_client(request_log=True)
    await client.post("/v1/completions", json={"prompt": "hi", "temperature": -1})
    engine.refuse = queue_full()
    await client.post("/v1/completions", json={"prompt": "hi"})
    engine.refuse = None
    engine.finish_reason = "expired"
    await client.post("/v1/completions", json={"prompt": "hi", "timeout": 1})
    await client.post("/v1/completions", json={"prompt": "hi", "model": "no\nsuch"})
    assert [(e["status"], e["finish_reason"], e["model"]) for e in out.entries()] == [
        (400, None, None),
        (429, None, "tiny"),
        (408, "expired", "tiny"),
        (404, None, None),
    ]


async def test_other_requests_have_none(log, make_client) -> None:
    out = log("json")
    client = make_client(request_log=True, api_keys=("k",))
    await client.get("/health")
    await client.post("/v1/completions", json={"prompt": "hi"})  # 401: anyone could fill the log
    await client.post("/tokenize", json={"prompt": "hi"}, headers={"authorization": "Bearer k"})
    assert not out.entries()


async def test_a_streams_line_comes_at_its_end(log, make_client, engine) -> None:
    out = log("json")
    client = make_client(request_log=True)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    await client.post("/v1/chat/completions", json=body)
    [entry] = out.entries()
    assert entry["stream"] is True and entry["finish_reason"] == "stop" and entry["status"] == 200


async def test_a_background_response_is_logged_when_its_work_is_done(
    log, make_client, engine
) -> None:
    out = log("json")
    client = make_client(request_log=True)
    engine.hold()
    answer = await client.post("/v1/responses", json={"input": "hi", "background": True})
    assert answer.json()["status"] == "queued" and not out.entries()
    engine.release()
    async with asyncio.timeout(60):
        while not out.entries():
            await asyncio.sleep(0.01)
    [entry] = out.entries()
    assert entry["finish_reason"] == "stop" and entry["status"] == 200
    bad = await client.post(
        "/v1/responses", json={"input": "hi", "background": True, "temperature": -1}
    )
    assert bad.status_code == 400 and len(out.entries()) == 2


@pytest.mark.parametrize("form", ["json", "text"])
async def test_clients_cannot_write_lines(log, make_client, engine, form) -> None:
    out = log(form)
    client = make_client(request_log=True)
    evil = 'x\n{"level":"info"}\x1b[31m\u2028'
    headers = {"x-request-id": "a b", "traceparent": "00-\x7f", "x-quire": "1"}
    for body in (
        {"prompt": evil, "request_id": evil, "user": evil, "cache_salt": evil},
        {"prompt": "x", "model": evil},
        {"prompt": "x", evil: 1, "timeout": evil},
    ):
        await client.post("/v1/completions", json=body, headers=headers)
    text = out.stream.getvalue()
    assert "\x1b" not in text and "31m" not in text and "a b" not in text
    assert len(text.splitlines()) == text.count("\n") == 3


async def test_a_line_of_text(log, make_client, engine) -> None:
    out = log("text")
    client = make_client(request_log=True)
    await client.post(
        "/v1/completions", json={"prompt": "hi there"}, headers={"x-request-id": "q1"}
    )
    text = out.stream.getvalue()
    assert "request q1: 200 stop, /v1/completions, 3 tokens in (2 cached), " in text


class Done:
    request_id = "r"
    sequence_ids = (3,)

    def __init__(self, **stats: float) -> None:
        self.last = RequestOutput("r", None, [1], [], True, RequestStateStats(**stats))


def test_times_are_the_longest_of_several_prompts() -> None:
    names = (
        "queued_ts",
        "scheduled_ts",
        "first_token_ts",
        "last_token_ts",
        "num_generation_tokens",
    )
    one = Done(**dict(zip(names, (1.0, 2.0, 5.0, 6.0, 2), strict=True)))
    two = Done(**dict(zip(names, (1.0, 4.0, 5.0, 9.0, 3), strict=True)))
    found = facts(Record(arrival_ts=0.5, ended_ts=10.0, work=[Work(one, 4), Work(two, 5)]))
    assert (found["queue_seconds"], found["prefill_seconds"], found["decode_seconds"]) == (3, 3, 4)
    assert (found["prompt_tokens"], found["output_tokens"], found["e2e_seconds"]) == (9, 5, 9.5)
    assert found["engine_ids"] == ["r3", "r3"]


async def test_a_report_that_fails_does_not_fail_the_request(
    log, make_client, engine, monkeypatch
) -> None:
    out = log("json")
    client = make_client(request_log=True)

    def broken(record) -> None:
        raise ValueError("no")

    monkeypatch.setattr("quire.server.state.log_finished", broken)
    assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200
    assert "could not be reported" in out.stream.getvalue()


NOT_GENERATING = {
    "/v1/responses/input_tokens", "/v1/responses/{response_id}/cancel", "/v1/messages/count_tokens",
    "/tokenize", "/detokenize", "/abort_requests", "/reset_prefix_cache", "/sleep", "/wake_up",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
}  # fmt: skip


def test_every_route_is_one_or_the_other() -> None:
    config = ServerConfig(enable_admin_endpoints=True, enable_tokenizer_info_endpoint=True)
    paths = build_app(ServerState(config)).openapi()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods}
    assert posts - NOT_GENERATING <= GENERATING <= posts


# --- the load header --------------------------------------------------------------------------------

LOAD = {
    "kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0, "num_requests_running": 2.0,
    "queue_tokens": 70.0, "estimated_wait_seconds": 1.5,
}  # fmt: skip


async def load(client, form: str | None, path: str = "/v1/completions") -> str | None:
    headers = {} if form is None else {"endpoint-load-metrics-format": form}
    answer = await client.post(path, json={"prompt": "hi", "input": "hi"}, headers=headers)
    return answer.headers.get("endpoint-load-metrics")


async def test_the_load_for_who_asks(client, engine) -> None:
    queue = LoadStats(queue_tokens=70, wait_seconds=1.5)
    engine.stats = SchedulerStats(num_running=2, num_waiting=3, kv_usage=0.25, load=queue)
    for form in ("TEXT", "text"):
        text = await load(client, form)
        pairs = dict(pair.split("=") for pair in text.removeprefix("TEXT ").split(", "))
        assert {name.removeprefix("named_metrics."): float(v) for name, v in pairs.items()} == LOAD
    answer = await load(client, "JSON")
    assert json.loads(answer.removeprefix("JSON ")) == {"named_metrics": LOAD}
    assert json.loads((await load(client, "json", "/v1/embeddings")).removeprefix("JSON "))
    for form in (None, "BIN", "", "text, json"):
        assert await load(client, form) is None


async def test_a_stream_and_a_refusal_have_it_and_other_routes_do_not(client, engine) -> None:
    headers = {"endpoint-load-metrics-format": "TEXT"}
    body = {"prompt": "hi", "stream": True}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["endpoint-load-metrics"].startswith(
        "TEXT named_metrics.kv_cache_usage_perc=0"
    )
    engine.refuse = queue_full()
    answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 429 and "endpoint-load-metrics" in answer.headers
    for path in ("/health", "/metrics"):
        assert "endpoint-load-metrics" not in (await client.get(path, headers=headers)).headers


async def test_without_an_engine_there_is_none(make_client) -> None:
    assert await load(make_client(loaded=False), "TEXT") is None


async def test_its_numbers_are_those_of_metrics(client, engine) -> None:
    """The names, at least: a balancer may read either."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    names = {family.name.partition(":")[2] for family in families}
    assert set(LOAD) <= names

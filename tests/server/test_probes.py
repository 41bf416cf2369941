"""Probes through the life of a server, and the small endpoints."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import FakeHealth

from quire.messages import RequestUpdate, SchedulerStats, StepOutputs
from quire.util.version import VERSION


async def test_while_loading(make_client, engine):
    client = make_client(loaded=False)
    for path in ("/health", "/ready", "/ping"):
        response = await client.get(path)
        assert (response.status_code, response.json()["status"]) == (503, "loading")
        assert response.headers["retry-after"]
    for path in ("/version", "/metrics"):
        assert (await client.get(path)).status_code == 200
    for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize")]:
        response = await client.request(method, path, json={"prompt": "a"})
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["message"] == "The model is still loading."
    client.state.engine_loaded(engine)
    for path in ("/health", "/ready", "/ping"):
        assert (await client.get(path)).status_code == 200


async def test_health_is_the_heartbeat(make_client, engine):
    client = make_client(health_timeout=30.0)
    assert (await client.get("/health")).json() == {"status": "ok", "heartbeat_age": 0.01}
    engine.health_now = FakeHealth(heartbeat_age=29.0)
    assert (await client.get("/health")).status_code == 200
    engine.health_now = FakeHealth(heartbeat_age=31.0)
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "stalled")


async def test_one_of_two_replicas_is_enough(client, engine):
    engine.health_now = FakeHealth(replicas=("ok", "stopped"))
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "degraded", "heartbeat_age": 0.01, "replicas": ["ok", "stopped"],
    }  # fmt: skip
    engine.health_now = FakeHealth(replicas=("ok", "ok"))
    assert (await client.get("/health")).json()["status"] == "ok"


async def test_while_the_engine_core_is_started_again(client, engine):
    engine.health_now = FakeHealth(replicas=("restarting",))
    for path, status in (("/health", 200), ("/ping", 200), ("/ready", 503)):
        response = await client.get(path)
        assert (response.status_code, response.json()["status"]) == (status, "restarting")
    engine.health_now = FakeHealth(replicas=("restarting", "ok"))
    assert (await client.get("/ready")).status_code == 200
    assert (await client.get("/health")).json()["status"] == "degraded"


async def test_each_replica_has_its_metrics(make_client, engine):
    engine.ready = msgspec.structs.replace(engine.ready, replicas=[engine.ready] * 2)
    engine.health_now = FakeHealth(replicas=("ok", "stopped"))
    client = make_client()
    for replica in (0, 1, 1):
        stats = SchedulerStats(num_running=replica, step_tokens=1)
        outputs = StepOutputs(
            updates=[RequestUpdate(request_id=1, new_token_ids=[5])], stats=stats, replica=replica
        )
        engine.metrics.on_step(outputs)
        engine.stats_listener(outputs)
        engine.metrics.on_token_gap(0.1)
    samples = [
        sample
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
    ]

    def read(name: str) -> list[float]:
        return [s.value for engine in "01" for s in samples
                if s.name == name and s.labels.get("engine") == engine]  # fmt: skip

    assert read("vllm:num_requests_running") == [0, 1]
    assert read("vllm:generation_tokens_total") == [1, 2]
    assert read("vllm:inter_token_latency_seconds_count") == [1, 2]
    assert read("vllm:cache_config_info") == [1, 1]
    assert read("quire:replica_up") == [1, 0]
    client.state.stats_logs[1].line(1.0)
    line = client.state.stats_logs[1].line(2.0)
    assert line is not None and line.startswith("Engine 001: ")


async def test_dead_engine(client, engine):
    engine.die("secret reason")
    response = await client.get("/health")
    assert response.status_code == 503 and "secret" not in response.text


async def test_draining_is_alive_and_not_ready(client):
    client.state.drain()
    assert (await client.get("/health")).status_code == 200
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert (await client.get("/v1/models")).status_code == 200


async def test_a_full_queue_is_ready(client, engine):
    """It is full everywhere at once: without any replica, clients get refused connections, not 429."""
    limit = client.state.engine_config.scheduler.max_num_queued_reqs
    engine.stats = SchedulerStats(num_waiting=limit)
    assert (await client.get("/ready")).status_code == 200


async def test_version(client):
    assert (await client.get("/version")).json() == {"version": VERSION}


async def test_metrics_are_the_engines(client, engine):
    engine.metrics.on_first_token(0.2, prompt_tokens=7, cached_tokens=3)
    text = (await client.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    [sample] = [
        s for s in families["vllm:prompt_tokens"].samples if s.name == "vllm:prompt_tokens_total"
    ]
    assert sample.value == 7 and sample.labels == {"model_name": "tiny", "engine": "0"}
    [info] = families["vllm:cache_config_info"].samples
    assert info.labels["kv_cache_size_tokens"] == "1600"
    assert info.labels["kv_cache_max_concurrency"] == "25.00"


async def test_metrics_are_text_for_every_scraper(client):
    for accept in ("text/plain", "application/openmetrics-text; version=1.0.0", "*/*"):
        response = await client.get("/metrics", headers={"accept": accept})
        assert response.headers["content-type"].startswith("text/plain; version=")
        assert list(text_string_to_metric_families(response.text))


async def test_models(client):
    body = (await client.get("/v1/models")).json()
    assert [card["id"] for card in body["data"]] == ["tiny", "alias"]
    assert body["data"][0] == {
        "id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "quire",
        "root": "tiny", "parent": None, "max_model_len": 64, "permission": [],
    }  # fmt: skip
    assert (await client.get("/v1/models/alias")).json()["id"] == "alias"
    assert (await client.get("/v1/models/org/name")).status_code == 404


async def test_tokenize_and_back(client):
    body = (
        await client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True})
    ).json()
    assert body == {
        "count": 3, "max_model_len": 64, "tokens": [1, 2, 3], "token_strs": ["<bos>", "a ", "b"],
    }  # fmt: skip
    body = (
        await client.post("/tokenize", json={"prompt": "a b", "add_special_tokens": False})
    ).json()
    assert (body["tokens"], body["token_strs"]) == ([2, 3], None)
    response = await client.post("/detokenize", json={"tokens": [1, 2, 3]})
    assert response.json() == {"prompt": "<bos>a b"}


async def test_tokenize_messages(client, engine):
    messages = [{"role": "user", "content": "hi"}]
    body = (await client.post("/tokenize", json={"messages": messages, "model": "alias"})).json()
    text = (await client.post("/detokenize", json={"tokens": body["tokens"]})).json()["prompt"]
    assert text == "user: hi\nassistant:"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "body.prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "body.prompt"),
        ("/tokenize", {"prompt": 5}, "body.prompt"),
        ("/tokenize", {"messages": []}, "body.messages"),
        ("/detokenize", {}, "body.tokens"),
        ("/detokenize", {"tokens": ["a"]}, "body.tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "body.tokens.0"),
        ("/detokenize", {"tokens": [1000]}, "tokens"),
    ],
)
async def test_bad_token_requests(client, path, body, param):
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)

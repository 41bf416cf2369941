"""What clients, logs and metrics say of where a prompt's KV was found."""

from __future__ import annotations

import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_openai_client import Server

from quire.prefix_report import MissReason, PrefixReport

ASK = {"return_prefix_details": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
ENDPOINTS = {
    "/v1/completions": ({"prompt": [5, 6, 7], "max_tokens": 4}, "prompt_tokens_details"),
    "/v1/chat/completions": (CHAT, "prompt_tokens_details"),
    "/v1/chat/completions/batch": (
        CHAT | {"messages": [CHAT["messages"]]},
        "prompt_tokens_details",
    ),
    "/v1/responses": ({"input": "hi"}, "input_tokens_details"),
    "/v1/messages": (CHAT, None),
}
REPORT = PrefixReport(
    device=1, ram=1, computed=1, reason=MissReason.EVICTED, since_step=7, seconds_ago=1.23456
)
DETAILS = {
    "device": 1, "ram": 1, "disk": 0, "peer": 0, "computed": 1, "reason": "evicted", "seconds_ago": 1.235,
}  # fmt: skip


def details(usage: dict, key: str | None) -> list | None:
    return (usage if key is None else usage[key]).get("prefix")


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_details_are_in_usage_for_who_asks(client, engine, path) -> None:
    body, key = ENDPOINTS[path]
    engine.prefix = REPORT
    plain = (await client.post(path, json=body)).json()["usage"]
    assert details(plain, key) is None
    asked = (await client.post(path, json=body | ASK)).json()["usage"]
    assert details(asked, key) == [DETAILS]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
async def test_a_stream_has_them_with_its_usage(client, engine, path) -> None:
    body, key = ENDPOINTS[path]
    engine.prefix = REPORT
    options = {"stream_options": {"include_usage": True}} if key else {}
    response = await client.post(path, json=body | ASK | options | {"stream": True})
    chunks = [json.loads(data) for data in re.findall("^data: ({.*)$", response.text, re.M)]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert details(usages[-1], key) == [DETAILS]


async def test_each_prompt_has_its_own(client, engine) -> None:
    engine.prefix = REPORT
    body = {"prompt": [[5, 6, 7], [8, 9, 1]], "max_tokens": 1, "n": 2} | ASK
    usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    assert details(usage, "prompt_tokens_details") == [DETAILS, DETAILS]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_clients_are_not_told_of_other_salts(client, engine, path) -> None:
    body, key = ENDPOINTS[path]
    engine.prefix = PrefixReport(computed=3, reason=MissReason.SALT)
    answer = await client.post(path, json=body | ASK)
    assert details(answer.json()["usage"], key)[0]["reason"] == "never_seen"
    assert "salt" not in answer.text


@pytest.fixture(scope="module")
def server():
    """Room for 2,048 tokens."""
    running = Server(
        "--enable-log-requests", "--kv-cache-memory-bytes", "4M", "--max-model-len", "1024"
    )
    yield running
    running.stop()


@pytest.mark.timeout(240)
def test_the_built_in_model_says_why(server) -> None:
    def ask(prompt: list[int], **fields) -> tuple[str, int]:
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0} | ASK | fields
        usage = server.http.post("/v1/completions", json=body).json()["usage"]
        (found,) = usage["prompt_tokens_details"]["prefix"]
        assert found["device"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert found["device"] + found["computed"] == usage["prompt_tokens"] == len(prompt)
        return found["reason"], found["device"]

    prompt = [300 + i for i in range(100)]
    assert ask(prompt) == ("never_seen", 0)
    assert ask(prompt) == ("block_boundary", 96)
    assert ask(prompt[:97]) == ("whole_prompt", 96)
    assert ask(prompt, prompt_logprobs=0) == ("capped", 0)
    assert ask(prompt, cache_salt="mine") == ("never_seen", 0), "not that others know it"
    for start in range(3):
        ask([1000 + start + i % 700 for i in range(1000)])
    assert ask(prompt) == ("evicted", 0)

    lines = [line for line in server.log if ": prompt: " in line]
    assert len(lines) == 9
    assert "4 computed; at 96: block_boundary" in lines[1] and "cmpl-" in lines[1]
    assert "at 0: other_salt" in lines[4]
    assert re.search(r"at 0: evicted [0-9.]+ s ago", lines[-1])
    counted = {
        sample.labels["reason"]: sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == "quire:prefix_miss_total" and sample.value
    }
    assert counted == {
        "never_seen": 4, "block_boundary": 1, "capped": 1, "other_salt": 1, "evicted": 1,
    }  # fmt: skip

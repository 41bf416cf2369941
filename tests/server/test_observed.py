"""A real server, asked by the real clients: deadlines; and log lines, spans and metrics that say the same of
a request."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import contextmanager

import anthropic
import openai
import pytest
from collector import PATIENCE, attributes, collecting, wait_for
from prometheus_client.parser import text_string_to_metric_families
from test_live import running
from test_openai_client import KEY, Server

from quire.errors import ConfigError

pytestmark = pytest.mark.timeout(300)

MODEL = "quire-builtin"
MESSAGES = [{"role": "user", "content": "PRIVATE words"}]
AT_ONCE = {"timeout": 1e-6}
"""Passes before any step."""
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector():
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(collector):
    running = Server(
        "--request-log", "--log-format", "json", "--otlp-traces-endpoint", collector.url,
        "--use-client-timeouts",
    )  # fmt: skip
    yield running
    running.stop()


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def line(server: Server, request_id: str) -> dict:
    """The request's line in the log; waits for it."""
    found: list[dict] = []

    def look() -> bool:
        entries = (json.loads(text) for text in list(server.log) if '"e2e_seconds"' in text)
        found[:] = [entry for entry in entries if entry["request_id"] == request_id]
        return bool(found)

    wait_for(look)
    [entry] = found
    return entry


def sample(server: Server, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return sum(
        s.value for f in families for s in f.samples
        if s.name == name and all(s.labels.get(k) == v for k, v in labels.items())
    )  # fmt: skip


def named(request_id: str, **more: str) -> dict:
    return {"X-Request-Id": request_id, **more}


def until_cut(ask):
    """`ask(seconds)` with less and less time, until the answer is cut. Machines differ too much for one
    number. ask: returns None for a whole answer, and raises `Expired`."""
    seconds, deadline = 2.0, time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            cut = ask(seconds)
        except Expired:
            seconds *= 1.7
            continue
        if cut is not None:
            return cut
        seconds /= 2
    raise AssertionError("no answer was cut")


class Expired(Exception):
    """It had so little time that it only waited."""


@contextmanager
def expiring():
    try:
        yield
    except (openai.APIError, anthropic.APIError) as error:
        if "nothing was computed" in str(error):
            raise Expired from None
        raise


# --- deadlines --------------------------------------------------------------------------------------


def test_an_answer_is_cut(server) -> None:
    def ask(seconds: float):
        with expiring():
            answer = server.client.completions.create(
                model=MODEL, prompt="PRIVATE words", max_tokens=1900, temperature=0,
                extra_body={"timeout": seconds, "ignore_eos": True}, extra_headers=named("cut"),
            )  # fmt: skip
        [choice] = answer.choices
        return answer if choice.finish_reason == "timeout" else None

    answer = until_cut(ask)
    assert 0 < answer.usage.completion_tokens < 1900 and answer.choices[0].text
    wait_for(lambda: sample(server, "vllm:kv_cache_usage_perc") == 0)
    assert sample(server, "vllm:num_requests_running") == 0
    assert sample(server, "vllm:request_success_total", finished_reason="timeout") >= 1


def test_a_stream_is_cut(server) -> None:
    def ask(seconds: float):
        reason, count = None, 0
        with expiring():
            for chunk in server.client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=1800, temperature=0, stream=True,
                extra_body={"timeout": seconds, "ignore_eos": True},
            ):  # fmt: skip
                assert reason is None, "the last chunk has it"
                count += bool(chunk.choices[0].delta.content)
                reason = chunk.choices[0].finish_reason
        return count if reason == "timeout" else None

    assert until_cut(ask) >= 0


def test_expired_for_openais_client(server) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body=AT_ONCE, extra_headers=named("late")
        )
    assert caught.value.status_code == 408 and caught.value.body["param"] == "timeout"
    entry = line(server, "late")
    assert (entry["status"], entry["finish_reason"], entry["output_tokens"]) == (408, "expired", 0)
    assert sample(server, "vllm:request_success_total", finished_reason="expired") >= 1
    assert sample(server, "vllm:num_requests_running") == 0


def test_openais_client_asks_again(server) -> None:
    """As docs/operations.md says: it takes 408 for a reason to."""
    with pytest.raises(openai.APIStatusError):
        server.client.with_options(max_retries=2).completions.create(
            model=MODEL, prompt="hi", extra_body=AT_ONCE, extra_headers=named("thrice")
        )
    wait_for(lambda: sum('"thrice"' in text for text in list(server.log)) == 3)


def test_expired_streams_raise_in_the_clients(server, claude) -> None:
    with pytest.raises(openai.APIError, match="nothing was computed"):
        list(
            server.client.completions.create(
                model=MODEL, prompt="hi", stream=True, extra_body=AT_ONCE
            )
        )
    with (
        pytest.raises(anthropic.APIStatusError, match="nothing was computed"),
        claude.messages.stream(
            model=MODEL, messages=MESSAGES, max_tokens=9, extra_body=AT_ONCE
        ) as stream,
    ):
        stream.get_final_message()


def test_expired_for_anthropics_client(claude) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(model=MODEL, messages=MESSAGES, max_tokens=9, extra_body=AT_ONCE)
    assert caught.value.status_code == 408
    assert caught.value.body["error"]["type"] == "timeout_error"


def test_cut_for_anthropics_client(server, claude) -> None:
    def ask(seconds: float):
        with expiring():
            message = claude.messages.create(
                model=MODEL, messages=MESSAGES, max_tokens=1800,
                extra_body={"timeout": seconds, "ignore_eos": True, "temperature": 0},
            )  # fmt: skip
        return message if message.usage.output_tokens < 1800 else None

    assert until_cut(ask).stop_reason == "max_tokens"


def test_the_clients_own_timeout(server) -> None:
    """It is a float in a header; the server ends the request before the client gives up, or about then."""
    with pytest.raises((openai.APITimeoutError, openai.APIStatusError)):
        server.client.completions.create(
            model=MODEL, prompt="hi", timeout=1e-3, max_tokens=1900, extra_body={"ignore_eos": True},
            extra_headers=named("impatient"),
        )  # fmt: skip
    assert line(server, "impatient")["finish_reason"] in ("expired", "timeout", "abort")


def test_embeddings_and_expired(server) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.embeddings.create(model=MODEL, input=["a", "b"], extra_body=AT_ONCE)
    assert caught.value.status_code == 408


def test_responses_that_expire(server) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.responses.create(model=MODEL, input="hi", extra_body=AT_ONCE)
    assert caught.value.status_code == 408
    queued = server.client.responses.create(
        model=MODEL, input="hi", background=True, extra_body=AT_ONCE
    )
    wait_for(lambda: server.client.responses.retrieve(queued.id).status == "failed")


# --- one request, seen from everywhere --------------------------------------------------------------


def test_line_and_spans_agree(server, collector) -> None:
    parent = f"00-{TRACE}-{SPAN}-01"
    answer = server.client.completions.create(
        model=MODEL, prompt="PRIVATE words " * 20, max_tokens=8, temperature=0.7, seed=1,
        extra_body={"ignore_eos": True}, extra_headers=named("seen", traceparent=parent, tracestate="v=1"),
    )  # fmt: skip
    entry = line(server, "seen")
    assert (entry["prompt_tokens"], entry["output_tokens"]) == (answer.usage.prompt_tokens, 8)
    assert entry["finish_reason"] == "length" and entry["trace_id"] == TRACE
    assert entry["answer_id"] == answer.id and entry["model"] == MODEL
    phases = [entry[f"{name}_seconds"] for name in ("queue", "prefill", "decode")]
    assert all(seconds is not None and seconds >= 0 for seconds in phases)
    assert (
        sum(phases) <= entry["e2e_seconds"] and entry["first_token_seconds"] <= entry["e2e_seconds"]
    )

    own, *children = collector.of_request("seen")
    assert (own["traceId"], own["parentSpanId"], own["traceState"], own["name"]) == (
        TRACE, SPAN, "v=1", "llm_request",
    )  # fmt: skip
    values = attributes(own)
    assert values["gen_ai.usage.prompt_tokens"] == answer.usage.prompt_tokens
    assert values["gen_ai.usage.completion_tokens"] == 8
    assert values["gen_ai.request.temperature"] == 0.7 and values["http.route"] == "/v1/completions"
    assert [s["name"] for s in children] == ["queue", "prefill", "decode"]
    for child, seconds in zip(children, phases, strict=True):
        took = int(child["endTimeUnixNano"]) - int(child["startTimeUnixNano"])
        assert took / 1e9 == pytest.approx(seconds, abs=2e-6)
        assert int(own["startTimeUnixNano"]) <= int(child["startTimeUnixNano"])
        assert int(child["endTimeUnixNano"]) <= int(own["endTimeUnixNano"])
    assert abs(int(own["endTimeUnixNano"]) / 1e9 - time.time()) < 60
    wait_for(lambda: sample(server, "quire:trace_spans_sent_total") >= 4)


def test_the_caller_may_decide_against_a_trace(server, collector) -> None:
    for request_id, flags in (("unseen", "00"), ("seen too", "01")):
        server.client.completions.create(
            model=MODEL, prompt="hi", max_tokens=1,
            extra_headers=named(request_id.replace(" ", "-"), traceparent=f"00-{TRACE}-{SPAN}-{flags}"),
        )  # fmt: skip
    collector.of_request("seen-too")
    assert not [s for s in collector.spans if attributes(s).get("gen_ai.request.id") == "unseen"]


def test_a_client_that_leaves_is_in_the_log_with_what_was_made(server) -> None:
    with server.client.completions.create(
        model=MODEL, prompt="hi", max_tokens=1900, stream=True, extra_body={"ignore_eos": True},
        extra_headers=named("left"),
    ) as stream:  # fmt: skip
        next(iter(stream))
    entry = line(server, "left")
    if entry["finish_reason"] != "length":  # a machine that is quick enough has made it all
        assert entry["finish_reason"] == "abort" and 0 < entry["output_tokens"] < 1900
    assert entry["prefill_seconds"] is not None


def test_several_prompts_and_sequences(server, collector) -> None:
    server.client.completions.create(
        model=MODEL, prompt=["a", "b c"], n=2, max_tokens=3, temperature=1, extra_body={"ignore_eos": True},
        extra_headers=named("many"),
    )  # fmt: skip
    entry = line(server, "many")
    assert entry["num_prompts"] == 2 and entry["output_tokens"] == 12
    _, *children = collector.of_request("many")
    assert len(children) == 6


def test_vectors(server, collector) -> None:
    server.client.embeddings.create(model=MODEL, input="PRIVATE", extra_headers=named("vector"))
    entry = line(server, "vector")
    assert entry["finish_reason"] == "length" and entry["queue_seconds"] is not None
    assert entry["output_tokens"] == 0
    _, *children = collector.of_request("vector")
    assert [s["name"] for s in children] == ["queue", "prefill"]


def test_no_text_anywhere(server, collector) -> None:
    """After all of the above, which may run in any order: this one makes its own."""
    answer = server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, extra_headers=named("text")
    )
    line(server, "text")
    collector.of_request("text")
    seen = "".join(server.log) + json.dumps(collector.bodies)
    assert "PRIVATE" not in seen and KEY not in seen
    words = re.findall(r"\w{9,}", answer.choices[0].message.content or "")
    assert not [word for word in words if word in seen and word not in "completions"]


# --- what becomes of spans, on a scripted engine -----------------------------------------------------


async def test_the_last_spans_leave_with_the_server() -> None:
    with collecting() as collector:
        async with running(otlp_traces_endpoint=collector.url) as server:
            await server.client.post(
                "/v1/completions", json={"prompt": "hi"}, headers=named("last")
            )
        assert attributes(collector.spans[0])["gen_ai.request.id"] == "last"


async def test_a_dead_collector_slows_nothing(caplog) -> None:
    """Nothing listens at port 9. Requests are served, and the loss is counted."""
    async with running(otlp_traces_endpoint="http://127.0.0.1:9") as server:
        for _ in range(20):
            answer = await server.client.post("/v1/completions", json={"prompt": "hi"})
            assert answer.status_code == 200
        async with asyncio.timeout(PATIENCE):
            while not await lost(server):
                await asyncio.sleep(0.05)
    assert sum("traces are lost" in text for text in caplog.messages) == 1


async def lost(server) -> float:
    families = text_string_to_metric_families((await server.client.get("/metrics")).text)
    samples = [s for family in families for s in family.samples]
    sent = [s.value for s in samples if s.name == "quire:trace_spans_sent_total"]
    assert sent == [0]
    name, reason = "quire:trace_spans_dropped_total", {"reason": "unreachable"}
    return sum(s.value for s in samples if s.name == name and s.labels == reason)


async def test_a_wrong_collector_is_told_at_the_start() -> None:
    with pytest.raises(ConfigError, match="OTLP over HTTP"):
        async with running(otlp_traces_endpoint="grpc://c:4317"):
            pass

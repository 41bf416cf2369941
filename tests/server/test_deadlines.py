"""A client's timeout becomes the engine's deadline, and its end an answer of each dialect. With the real
clients and engine: test_observed.py."""

from __future__ import annotations

import json
import time

import pytest
from scripted_engine import data_lines

from quire.outputs import CompletionOutput, RequestOutput
from quire.server.deadlines import check_expired
from quire.server.errors import ApiError

MESSAGES = [{"role": "user", "content": "hi"}]
GENERATING = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
}
BODIES = GENERATING | {
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/embeddings": {"input": "hi"},
    "/pooling": {"input": "hi"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
}


async def allowed(client, engine, path="/v1/completions", headers=None, **body) -> float | None:
    """The seconds that the engine gives the request, from its arrival, to the second."""
    before = time.monotonic()
    answer = await client.post(path, json=BODIES[path] | body, headers=headers)
    assert answer.status_code == 200, answer.text
    deadline = engine.submitted[-1].deadline
    if deadline is None:
        return None
    took = time.monotonic() - before
    least = deadline - before - took
    seconds = round(deadline - before)
    assert least <= seconds <= deadline - before + 1, "counted from the arrival"
    return seconds


@pytest.mark.parametrize("path", BODIES)
async def test_every_endpoint_takes_one(client, engine, path) -> None:
    assert await allowed(client, engine, path) is None
    assert await allowed(client, engine, path, timeout=1000) == 1000
    assert await allowed(client, engine, path, {"x-request-timeout": "2000"}) == 2000


@pytest.mark.parametrize("path", GENERATING)
async def test_a_stream_has_one_too(client, engine, path) -> None:
    assert await allowed(client, engine, path, stream=True, timeout=1000.5) in (1000, 1001)


async def test_the_smallest_one_counts(make_client, engine) -> None:
    client = make_client(use_client_timeouts=True)
    read = "x-stainless-read-timeout"
    assert await allowed(client, engine, headers={"x-request-timeout": "500"}, timeout=900) == 500
    assert await allowed(client, engine, headers={"x-request-timeout": "900"}, timeout=500) == 500
    assert await allowed(client, engine, headers={read: "300.0"}, timeout=900) == 300
    assert await allowed(client, engine, headers={read: "900"}, timeout=300) == 300
    assert await allowed(client, engine, headers={read: "1e9"}) == 86400
    for junk in ("", "None", "nan", "-1", "0"):
        assert await allowed(client, engine, headers={read: junk}) is None


async def test_a_clients_own_timeout_counts_only_where_it_is_meant(make_client, engine) -> None:
    """It is a time between bytes: it says nothing of a stream, nor of what nobody waits for."""
    headers = {"x-stainless-read-timeout": "300"}
    assert await allowed(make_client(), engine, headers=headers) is None
    client = make_client(use_client_timeouts=True)
    assert await allowed(client, engine, headers=headers, stream=True) is None
    assert await allowed(client, engine, "/v1/responses", headers, background=True) is None
    assert await allowed(client, engine, "/v1/responses", headers) == 300
    assert await allowed(client, engine, headers=headers, stream=True, timeout=400) == 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("timeout", [0, -1, 86401, 1e308, "5", True, [5]])
async def test_wrong_times_are_refused(client, engine, path, timeout) -> None:
    answer = await client.post(path, json=BODIES[path] | {"timeout": timeout})
    assert answer.status_code == 400 and "timeout" in answer.text
    assert not engine.submitted


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "86401", "5s", "", "5, 5"])
async def test_wrong_headers_are_refused(client, engine, value) -> None:
    answer = await client.post(
        "/v1/completions", json=BODIES["/v1/completions"], headers={"x-request-timeout": value}
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-request-timeout"
    assert not engine.submitted


async def test_a_header_that_is_sent_twice_is_refused(client, engine) -> None:
    headers = [("x-request-timeout", "5"), ("x-request-timeout", "6")]
    answer = await client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
    assert answer.status_code == 400 and "once" in answer.text


async def test_null_is_none(client, engine) -> None:
    assert await allowed(client, engine, timeout=None) is None


# --- expired: 408, or an error event ----------------------------------------------------------------


@pytest.mark.parametrize("path", [*GENERATING, "/v1/chat/completions/batch"])
async def test_expired_is_408(client, engine, path) -> None:
    engine.finish_reason = "expired"
    answer = await client.post(path, json=BODIES[path] | {"timeout": 5})
    assert answer.status_code == 408, answer.text
    error = answer.json()["error"]
    assert "nothing was computed" in error["message"]
    if path == "/v1/messages":
        assert answer.json()["type"] == "error" and error["type"] == "timeout_error"
    else:
        assert (error["code"], error["type"], error["param"]) == (408, "Request Timeout", "timeout")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_expired_stream_is_an_error_event(client, engine, path) -> None:
    engine.finish_reason, engine.answer = "expired", [""]
    answer = await client.post(path, json=BODIES[path] | {"stream": True, "timeout": 5})
    error, done = data_lines(answer.text)
    assert json.loads(error)["error"]["code"] == 408 and done == "[DONE]"


async def test_an_expired_stream_of_the_other_dialects(client, engine) -> None:
    engine.finish_reason, engine.answer = "expired", [""]
    body = {"stream": True, "timeout": 5}
    answer = await client.post("/v1/messages", json=BODIES["/v1/messages"] | body)
    assert answer.text.startswith("event: error") and "timeout_error" in answer.text
    answer = await client.post("/v1/responses", json=BODIES["/v1/responses"] | body)
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith("event: response.failed") and "nothing was computed" in last


def output(*reasons: str) -> RequestOutput:
    parts = [CompletionOutput(i, "", [], finish_reason=reason) for i, reason in enumerate(reasons)]
    return RequestOutput("r", None, [1], parts, True)


def reasons(*outputs: RequestOutput) -> list[str | None]:
    return [part.finish_reason for each in outputs for part in each.outputs]


def test_what_has_a_part_is_no_error() -> None:
    mixed = [output("expired"), output("stop", "expired")]
    check_expired(mixed)
    assert reasons(*mixed) == ["timeout", "stop", "timeout"]
    late = output("expired")
    check_expired([late], answered=True)
    assert reasons(late) == ["timeout"]


def test_what_has_none_is() -> None:
    with pytest.raises(ApiError) as caught:
        check_expired([output("expired"), output("expired", "expired")])
    assert caught.value.status == 408
    check_expired([])
    check_expired([RequestOutput("r", None, [1], [], True)])


# --- timeout: an answer that says so ----------------------------------------------------------------


async def test_cut_answers_say_so(client, engine) -> None:
    engine.finish_reason = "timeout"

    async def ask(path: str) -> dict:
        answer = await client.post(path, json=BODIES[path])
        assert answer.status_code == 200
        return answer.json()

    [choice] = (await ask("/v1/completions"))["choices"]
    assert choice["finish_reason"] == "timeout" and choice["text"]
    [choice] = (await ask("/v1/chat/completions"))["choices"]
    assert choice["finish_reason"] == "timeout" and choice["message"]["content"]
    response = await ask("/v1/responses")
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    message = await ask("/v1/messages")
    assert message["stop_reason"] == "max_tokens" and message["content"][0]["text"]


async def test_the_last_chunk_of_a_stream_says_so(client, engine) -> None:
    engine.finish_reason = "timeout"
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = await client.post(path, json=BODIES[path] | {"stream": True})
        *_, last, done = data_lines(answer.text)
        assert json.loads(last)["choices"][0]["finish_reason"] == "timeout" and done == "[DONE]"
    answer = await client.post("/v1/messages", json=BODIES["/v1/messages"] | {"stream": True})
    assert '"stop_reason":"max_tokens"' in answer.text
    answer = await client.post("/v1/responses", json=BODIES["/v1/responses"] | {"stream": True})
    assert "event: response.incomplete" in answer.text

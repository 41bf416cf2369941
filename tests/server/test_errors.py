"""Every way to be wrong: status, type, param, and that the engine never hears of it."""

from __future__ import annotations

import json

import httpx
import pytest
from scripted_engine import data_lines, queue_full

from quire.errors import EngineDeadError, EngineError
from quire.structured.base import GrammarError, NoTokenLeftError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"prompt": None}, "Bad Request", "body.prompt"),
        ({"prompt": 5}, "Bad Request", "body.prompt"),
        ({"prompt": {"a": 1}}, "Bad Request", "body.prompt"),
        ({"prompt": ["a", 1]}, "Bad Request", "body.prompt"),
        ({"prompt": [[1], "a"]}, "Bad Request", "body.prompt"),
        ({"prompt": [-1]}, "Bad Request", "body.prompt"),
        ({"prompt": [1.5]}, "Bad Request", "body.prompt"),
        ({"prompt": [True]}, "Bad Request", "body.prompt"),
        ({"prompt": []}, "Bad Request", "body.prompt"),
        ({"prompt": ""}, "BadRequestError", "prompt"),
        ({"prompt": [[]]}, "BadRequestError", "prompt"),
        ({"prompt": [1000]}, "BadRequestError", "prompt"),
        ({"prompt": [2**40]}, "Bad Request", "body.prompt"),
        ({"prompt": ["a"] * 1025}, "BadRequestError", "prompt"),
        ({"n": 0}, "BadRequestError", "n"),
        ({"n": 2, "temperature": 0}, "BadRequestError", "n"),
        ({"n": "2"}, "Bad Request", "body.n"),
        ({"n": 1.0}, "Bad Request", "body.n"),
        ({"n": True}, "Bad Request", "body.n"),
        ({"prompt": ["a"] * 20, "n": 1000}, "BadRequestError", "n"),
        ({"n": 10**30}, "BadRequestError", "n"),
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"temperature": 99}, "BadRequestError", "temperature"),
        ({"temperature": "hot"}, "Bad Request", "body.temperature"),
        ({"top_p": 0}, "BadRequestError", "top_p"),
        ({"top_k": -2}, "BadRequestError", "top_k"),
        ({"min_p": 2}, "BadRequestError", "min_p"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"max_tokens": -5}, "BadRequestError", "max_tokens"),
        ({"max_tokens": 64}, "BadRequestError", "max_tokens"),
        ({"min_tokens": 20}, "BadRequestError", "min_tokens"),
        ({"stop": ["x"] * 10_000}, "BadRequestError", "stop"),
        ({"stop": list("abcde")}, "BadRequestError", "stop"),
        ({"bad_words": ["x"] * 129}, "BadRequestError", "bad_words"),
        ({"stop": [""]}, "BadRequestError", "stop"),
        ({"stop": [1]}, "Bad Request", "body.stop"),
        ({"stop": ["x" * 5000]}, "BadRequestError", "stop"),
        ({"stop_token_ids": ["a"]}, "Bad Request", "body.stop_token_ids.0"),
        ({"logprobs": 6}, "BadRequestError", "logprobs"),
        ({"logprobs": -1}, "BadRequestError", "logprobs"),
        ({"logprobs": -2}, "BadRequestError", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "BadRequestError", "stream_options"),
        ({"stream": True, "stream_options": 1}, "Bad Request", "body.stream_options"),
        ({"cache_salt": ""}, "Bad Request", "body.cache_salt"),
        ({"cache_salt": "x" * 1025}, "Bad Request", "body.cache_salt"),
        ({"priority": 2**40}, "Bad Request", "body.priority"),
        ({"truncation_side": "middle"}, "Bad Request", "body.truncation_side"),
        ({"truncate_prompt_tokens": 0}, "BadRequestError", "truncate_prompt_tokens"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_bad_fields(client, engine, body, kind, param, streamed):
    if "stream" not in body and "stream_options" not in body:
        body = {**body, "stream": streamed}
    response = await client.post(COMPLETIONS, json={"prompt": "a", **body})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == (kind, param), error
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}), ("guided_regex", "a"), ("guided_choice", ["a"]),
        ("guided_grammar", "x"), ("guided_decoding_backend", "outlines"),
        ("guided_whitespace_pattern", " "), ("structural_tag", "{}"),
        ("best_of", 2),
        ("logits_processors", ["x"]), ("prompt_logprob_token_ids", [1]),
        ("ec_transfer_params", {"a": 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_known_but_unsupported_is_refused_by_name(client, engine, url, name, value):
    base = {"prompt": "a", "messages": HI}
    response = await client.post(url, json={**base, name: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == name and name in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        (COMPLETIONS, "suffix", "x"), (COMPLETIONS, "prompt_embeds", "AAAA"),
        (CHAT, "tools", [{"type": "function"}]), (CHAT, "tool_choice", "required"),
        (CHAT, "chat_template", "{{ 1 }}"),
        (CHAT, "echo", True), (CHAT, "audio", {}), (CHAT, "modalities", ["audio"]),
        (CHAT, "functions", [{"name": "f"}]),
    ],
)  # fmt: skip
async def test_unsupported_on_one_endpoint(client, url, name, value):
    response = await client.post(url, json={"prompt": "a", "messages": HI, name: value})
    assert (response.status_code, error_of(response)["param"]) == (400, name)


@pytest.mark.parametrize(
    "neutral",
    [
        {"logit_bias": {}}, {"response_format": {"type": "text"}}, {"best_of": 1},
        {"use_beam_search": False}, {"length_penalty": 1.0}, {"bad_words": []}, {"suffix": None},
        {"tools": []}, {"tool_choice": "none"}, {"parallel_tool_calls": True}, {"user": "x"},
        {"modalities": ["text"]}, {"service_tier": "auto"},
    ],
)  # fmt: skip
async def test_neutral_values_pass_without_a_word(client, neutral):
    response = await client.post(CHAT, json={"messages": HI, **neutral})
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()


async def test_prompt_too_long_names_both_numbers(client):
    response = await client.post(COMPLETIONS, json={"prompt": [5] * 70})
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == "input_tokens"
    assert "64" in error["message"] and "70" in error["message"]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_unknown_model(client, engine, url):
    body = {"prompt": "a", "model": "gpt-9"}
    if url == CHAT:
        body = {"messages": HI, "model": "gpt-9"}
    if url == "/detokenize":
        body = {"tokens": [1], "model": "gpt-9"}
    response = await client.post(url, json=body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (404, "NotFoundError", "model")
    assert error["message"] == ("The model `gpt-9` does not exist. Valid aliases: tiny, alias.")
    assert engine.submitted == []


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"not json", b"[]", b"5", b'"x"', b"null", b'{"prompt": "a"} x',
        b'{"prompt": NaN}', b'{"temperature": NaN, "prompt": "a"}',
        b'{"temperature": Infinity, "prompt": "a"}', b'{"temperature": -Infinity, "prompt": "a"}',
        b'{"temperature": 1e999, "prompt": "a"}', b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 5000,
        b'{"n": ' + b"9" * 5000 + b', "prompt": "a"}', b"\x00",
    ],
)  # fmt: skip
async def test_bodies_that_are_no_request(client, engine, raw):
    response = await client.post(
        COMPLETIONS, content=raw, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error_of(response)
    assert engine.submitted == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_content_type_must_be_json(client, kind):
    """Browsers send these across origins without asking; JSON they do not."""
    response = await client.post(
        COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind}
    )
    assert response.status_code == 415
    error_of(response)


async def test_unknown_route_and_method(client):
    response = await client.get("/nope")
    assert response.status_code == 404
    assert response.json()["detail"] == "Not Found"
    error_of(response)
    response = await client.get(COMPLETIONS)
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    error_of(response)


async def test_queue_full(client, engine):
    engine.refuse = queue_full()
    response = await client.post(COMPLETIONS, json={"prompt": "a"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2400"
    assert "queue is full" in error_of(response)["message"]


SECRET = "0x7f3a /root/.cache password"


@pytest.mark.parametrize(
    "failure",
    [EngineDeadError(SECRET), EngineError(SECRET), RuntimeError(SECRET), KeyError(SECRET)],
)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("at", ["submit", "run"])
async def test_failures_say_the_request_id_and_nothing_else(
    make_client, engine, failure, streamed, at, caplog
):
    if at == "submit":
        engine.refuse = failure
    else:
        engine.fail_at, engine.failure = 0, failure
    response = await make_client().post(
        CHAT,
        json={"messages": HI, "stream": streamed},
        headers={"x-request-id": "mine-1"},
    )
    assert SECRET not in response.text
    if streamed and at == "run":
        assert response.status_code == 200
        *_, error, done = data_lines(response.content)
        assert done == "[DONE]"
        error = json.loads(error)["error"]
        assert error["code"] == 500
    else:
        assert response.status_code == 500
        error = error_of(response)
    assert error["type"] == "InternalServerError"
    assert "mine-1" in error["message"]
    assert SECRET in caplog.text, "the operator does get to see it"


async def test_error_in_the_middle_of_a_stream(client, engine):
    engine.fail_at = 2
    response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    lines = data_lines(response.content)
    assert [json.loads(x)["choices"][0]["text"] for x in lines[:2]] == ["Hello", " there"]
    assert json.loads(lines[2])["error"]["code"] == 500
    assert lines[3:] == ["[DONE]"]


async def test_one_failing_prompt_aborts_its_siblings(client, engine):
    engine.fail_at = 1
    response = await client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"], "stream": True})
    lines = data_lines(response.content)
    assert json.loads(lines[-2])["error"]["code"] == 500 and lines[-1] == "[DONE]"
    assert all(stream.ended for stream in engine.streams)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (500, "The model produced NaN for this request."),
        (400, str(NoTokenLeftError(["thinking_token_budget", "min_tokens"]))),
        (400, str(GrammarError("it is too complex."))),
    ],
)
async def test_request_that_failed_alone(client, engine, streamed, code, text):
    engine.answer, engine.finish_reason = ["x"], "error"
    engine.error_text = text
    response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": streamed})
    if streamed:
        error = json.loads(data_lines(response.content)[-2])["error"]
    else:
        error = error_of(response)
    assert (error["code"], error["message"]) == (code, text)


async def test_a_bug_in_a_route_is_a_plain_500(make_client, engine, monkeypatch):
    import quire.server.tokens as tokens

    monkeypatch.setattr(tokens, "model_card", lambda *_: 1 / 0)
    response = await make_client().get("/v1/models")
    assert response.status_code == 500
    assert "division" not in response.text
    assert response.headers["x-request-id"] in error_of(response)["message"]


async def test_hostile_lists_stop_at_the_first_error(client):
    """A million bad items must not become a million error objects."""
    import time

    begun = time.thread_time()
    raw = b'{"prompt": [' + b"[{}]," * 500_000 + b"1]}"
    response = await client.post(
        COMPLETIONS, content=raw, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400 and len(response.content) < 1000
    assert time.thread_time() - begun < 5

"""Parameters over HTTP: each reaches the engine or is answered; limits, strictness, what is in force; and the
table of errors that clients of vLLM rely on."""

from __future__ import annotations

import json

import pytest
from scripted_engine import data_lines, queue_full

from quire.errors import ConfigError
from quire.sampling_params import (
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.server.requests import ChatCompletionRequest, CompletionRequest
from quire.server.sampling import DIRECT, NOT_SHOWN

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BOTH = pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def body_for(url: str, **fields: object) -> dict[str, object]:
    return ({"prompt": "a b"} if url == COMPLETIONS else {"messages": HI}) | fields


async def params_of(client, engine, url: str, **fields: object) -> SamplingParams:
    response = await client.post(url, json=body_for(url, **fields))
    assert response.status_code == 200, response.text
    return engine.submitted[-1].params


# --- every parameter ---

VALUES: dict[str, tuple[object, object]] = {
    "n": (2, 2), "presence_penalty": (0.5, 0.5), "frequency_penalty": (-0.5, -0.5),
    "repetition_penalty": (1.1, 1.1), "temperature": (0.7, 0.7), "top_p": (0.8, 0.8),
    "top_k": (40, 40), "min_p": (0.05, 0.05), "seed": (7, 7), "stop": ("x", ["x"]),
    "stop_token_ids": ([3], [3]), "ignore_eos": (True, True), "max_tokens": (9, 9),
    "min_tokens": (2, 2), "prompt_logprobs": (2, 2), "prompt_logprob_start": (1, 1),
    "logprob_token_ids": ([4, 5], [4, 5]),
    "logit_bias": ({"5": 1, "6": -200, "7": 10**400}, {5: 1.0, 6: -100.0, 7: 100.0}),
    "allowed_token_ids": ([1, 2], [1, 2]), "bad_words": (["no"], ["no"]),
    "structured_outputs": ({"regex": "a+", "json": None}, StructuredOutputsParams(regex="a+")),
    "thinking_token_budget": (0, 0),
    "repetition_detection": (
        {"max_pattern_size": 4, "min_count": 3},
        RepetitionDetectionParams(max_pattern_size=4, min_count=3),
    ),
    "skip_special_tokens": (False, False), "spaces_between_special_tokens": (False, False),
    "include_stop_str_in_output": (True, True), "stream_interval": (4, 4),
    "skip_reading_prefix_cache": (True, True),
}  # fmt: skip
"""Field -> what is sent, and what the engine gets."""


def test_no_parameter_is_forgotten() -> None:
    """What a client can set is what `SamplingParams` has, but for what HTTP decides itself."""
    settable = set(SamplingParams.__struct_fields__) - set(NOT_SHOWN) - {"logprobs"}
    assert VALUES.keys() == settable
    assert (
        settable
        <= CompletionRequest.model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    )
    assert set(DIRECT) <= settable


@BOTH
@pytest.mark.parametrize("name", VALUES)
async def test_every_parameter_reaches_the_engine(client, engine, url, name, monkeypatch):
    sent, expected = VALUES[name]
    if name == "thinking_token_budget":  # only reasoning models have thoughts to count
        monkeypatch.setattr(engine.checks, "process", lambda *_, **__: None)
    extra = {"logprobs": 1 if url == COMPLETIONS else True} if name == "logprob_token_ids" else {}
    params = await params_of(client, engine, url, **{name: sent}, **extra)
    assert getattr(params, name) == expected


@BOTH
async def test_neutral_values_are_the_defaults(client, engine, url):
    neutral = {
        "logit_bias": {}, "bad_words": [], "structured_outputs": {}, "repetition_detection": {},
        "response_format": {"type": "text"}, "best_of": 1, "guided_choice": [], "seed": -1,
    }  # fmt: skip
    plain = await params_of(client, engine, url)
    assert await params_of(client, engine, url, **neutral) == plain


@BOTH
async def test_all_logprobs_where_the_server_allows_it(client, engine, url):
    asked = {"logprobs": -1} if url == COMPLETIONS else {"logprobs": True, "top_logprobs": -1}
    engine.model.max_logprobs = -1
    assert (await params_of(client, engine, url, **asked)).logprobs == -1


@BOTH
async def test_best_of_may_equal_n(client, engine, url):
    assert (await params_of(client, engine, url, n=3, best_of=3)).n == 3


@BOTH
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"repetition_detection": {"max_pattern": 4}}, "repetition_detection"),
        ({"repetition_detection": {"max_pattern_size": "4"}}, "repetition_detection"),
        ({"repetition_detection": {"max_pattern_size": 4, "min_count": 1}}, "repetition_detection"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"top_k": 10**30}, "top_k"),
        ({"prompt_logprob_start": 10**30}, "prompt_logprob_start"),
        (
            {"repetition_detection": {"max_pattern_size": 4, "min_count": 10**30}},
            "repetition_detection",
        ),
        ({"structured_outputs": {"json": {"const": 10**30}}}, "structured_outputs"),
    ],
)
async def test_bad_values_name_their_field(client, engine, url, fields, param):
    response = await client.post(url, json=body_for(url, **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


# --- structured output ---


@BOTH
async def test_response_format(client, engine, url):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    params = await params_of(client, engine, url, response_format=schema)
    assert params.structured_outputs == StructuredOutputsParams(json=SCHEMA)
    params = await params_of(client, engine, url, response_format={"type": "json_object"})
    assert params.structured_outputs == StructuredOutputsParams(json_object=True)


async def test_grammars_are_tried_off_the_loop_and_only_where_there_is_one(client, engine):
    await params_of(client, engine, COMPLETIONS)
    assert engine.grammar_threads == []
    await params_of(client, engine, COMPLETIONS, structured_outputs={"regex": "a"})
    [thread] = engine.grammar_threads
    assert thread != "MainThread"


# --- limits ---


@pytest.mark.parametrize(
    ("option", "at_most", "beyond", "param"),
    [
        ("max_sequences_per_request", {"prompt": ["a", "b"], "n": 2}, {"n": 5}, "n"),
        ("max_stop_strings", {"stop": list("abcd")}, {"stop": list("abcde")}, "stop"),
        ("max_bad_words", {"bad_words": list("abcd")}, {"bad_words": list("abcde")}, "bad_words"),
        (
            "max_list_items",
            {"stop_token_ids": [1] * 4},
            {"stop_token_ids": [1] * 5},
            "stop_token_ids",
        ),
        ("max_list_items", {}, {"logit_bias": {str(i): 1 for i in range(5)}}, "logit_bias"),
        ("max_list_items", {}, {"allowed_token_ids": [1] * 5}, "allowed_token_ids"),
        ("max_prompts_per_request", {"prompt": ["a"] * 4}, {"prompt": ["a"] * 5}, "prompt"),
    ],
)
async def test_limits_are_options(make_client, engine, option, at_most, beyond, param):
    client = make_client(**{option: 4})
    response = await client.post(COMPLETIONS, json={"prompt": "a"} | at_most)
    assert response.status_code == 200, response.text
    submitted = len(engine.submitted)
    response = await client.post(COMPLETIONS, json={"prompt": "a"} | beyond)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert f"--{option.replace('_', '-')}" in error["message"]
    assert len(engine.submitted) == submitted


@pytest.mark.parametrize("value", [0, 1 << 20])
def test_a_limit_cannot_be_beyond_what_is_taken_at_all(make_client, value):
    with pytest.raises(ConfigError, match="max_stop_strings must be at least 1 and at most 256"):
        make_client(max_stop_strings=value)


# --- what is unknown, or has no effect ---


@BOTH
async def test_fields_without_effect_are_reported(client, url):
    response = await client.post(url, json=body_for(url, vllm_xargs={"a": 10**30}, user="me"))
    assert response.json()["warnings"] == ["field vllm_xargs has no effect"]
    assert response.headers["x-quire-warnings"] == "field vllm_xargs has no effect"


async def test_strict_requests_on_every_route(make_client, engine):
    client = make_client(strict_requests=True)
    document = (await client.get("/openapi.json")).json()
    routes = [
        path
        for path, methods in document["paths"].items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", {})
    ]
    assert {COMPLETIONS, CHAT, "/tokenize", "/detokenize"} <= set(routes)
    for path in routes:
        rest = {} if path.startswith("/v1/responses") else body_for(CHAT)
        response = await client.post(path, json={"frobnicate": 1} | rest)
        error = response.json()["error"]
        assert response.status_code == 400 and "--strict-requests" in error["message"], path
        named = error["message"] if path.startswith("/v1/messages") else error["param"]
        assert "frobnicate" in named, (path, error)


@BOTH
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"x\ny": 1}, "x?y"),
        ({"user": "me", "n": None}, None),
    ],
)
async def test_strict_requests(make_client, engine, url, fields, param):
    client = make_client(strict_requests=True)
    response = await client.post(url, json=body_for(url, **fields))
    if param is None:
        assert response.status_code == 200 and "warnings" not in response.json()
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert engine.submitted == []


async def test_body_request_id_stands_in_for_the_header(client, engine):
    response = await client.post(COMPLETIONS, json={"prompt": "a", "request_id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    both = {"headers": {"x-request-id": "header"}, "json": {"prompt": "a", "request_id": "mine"}}
    assert (await client.post(COMPLETIONS, **both)).headers["x-request-id"] == "header"
    response = await client.post(COMPLETIONS, json={"prompt": "a", "request_id": "a\r\nb: c"})
    assert (
        response.headers.get_list("x-request-id") != ["a\r\nb: c"] and "b" not in response.headers
    )
    assert all("mine" not in submitted.request_id for submitted in engine.submitted)


# --- what is in force ---


async def test_effective_params(make_client, engine):
    engine.model.default_sampling = {"temperature": 0.2, "max_tokens": 1000}
    client = make_client()
    asked = {"prompt": ["a", "a b c"], "top_k": -1, "logit_bias": {"5": 300}, "seed": 7}
    answer = (await client.post(COMPLETIONS, json=asked | {"return_effective_params": True})).json()
    shown = answer["effective_params"]
    assert shown.keys() == set(SamplingParams.__struct_fields__) - set(NOT_SHOWN)
    assert (shown["temperature"], shown["top_k"], shown["seed"]) == (0.2, 0, 7)
    assert shown["logit_bias"] == {"5": 100.0}
    assert shown["max_tokens"] == 64 - 4, "what is left to the longest prompt"
    assert "effective_params" not in (await client.post(COMPLETIONS, json=asked)).json()


async def test_effective_params_come_once_in_a_stream(client):
    fields = {"stream": True, "return_effective_params": True, "temperature": 0}
    response = await client.post(COMPLETIONS, json={"prompt": "a", **fields})
    chunks = [json.loads(line) for line in data_lines(response.content)[:-1]]
    assert chunks[0]["effective_params"]["temperature"] == 0.0
    assert all("effective_params" not in chunk for chunk in chunks[1:])


# --- compat.md 2.6, row by row ---

ROWS = [
    # what, url, body, status, type, param, words of the message
    ("missing field", COMPLETIONS, {}, 400, "Bad Request", "body.prompt", "required"),
    ("missing field", CHAT, {}, 400, "Bad Request", "body.messages", "required"),
    ("ill-typed field", COMPLETIONS, {"prompt": {}}, 400, "Bad Request", "body.prompt", "string"),
    ("mixed prompts", COMPLETIONS, {"prompt": ["a", [1]]}, 400, "Bad Request", "body.prompt", "list"),
    ("ill-typed field", CHAT, {"messages": "hi"}, 400, "Bad Request", "body.messages", "list"),
    ("broken rule", COMPLETIONS, {"prompt": "a", "top_p": 7}, 400, "BadRequestError", "top_p", "(0, 1]"),
    ("broken rule", CHAT, {"messages": HI, "n": 0}, 400, "BadRequestError", "n", "between 1 and"),
    ("prompt too long", COMPLETIONS, {"prompt": [5] * 70}, 400, "BadRequestError", "input_tokens",
     "This model's maximum context length is 64 tokens. However, your prompt contains 70 input tokens, "
     "which exceeds this limit even without any output tokens"),
    ("prompt + max_tokens too long", COMPLETIONS, {"prompt": [5] * 60, "max_tokens": 9}, 400,
     "BadRequestError", "max_tokens", "you requested 9 output tokens and your prompt contains 60 input"),
    ("unknown model", COMPLETIONS, {"prompt": "a", "model": "x"}, 404, "NotFoundError", "model",
     "The model `x` does not exist. Valid aliases: tiny, alias."),
    ("unknown model", CHAT, {"messages": HI, "model": "x"}, 404, "NotFoundError", "model", "`x`"),
    ("stream_options alone", COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}},
     400, "BadRequestError", "stream_options", "stream"),
    ("prompt_logprobs streamed", CHAT, {"messages": HI, "prompt_logprobs": 1, "stream": True}, 400,
     "BadRequestError", "prompt_logprobs", "stream"),
    ("logprobs > max", COMPLETIONS, {"prompt": "a", "logprobs": 6}, 400, "BadRequestError", "logprobs",
     "5"),
    ("logprobs > max", CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 6}, 400,
     "BadRequestError", "logprobs", "5"),
    ("bad grammar", CHAT, {"messages": HI, "structured_outputs": {"regex": "("}}, 400,
     "BadRequestError", "structured_outputs", "broken"),
    ("max_tokens 0 without echo", COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400,
     "BadRequestError", "max_tokens", "at least 1"),
    ("suffix", COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "BadRequestError", "suffix",
     "fill in the middle"),
    ("prompt_embeds", COMPLETIONS, {"prompt": "a", "prompt_embeds": "x"}, 400, "BadRequestError",
     "prompt_embeds", "token ids"),
    ("removed name", CHAT, {"messages": HI, "guided_json": SCHEMA}, 400, "BadRequestError",
     "guided_json", 'structured_outputs: {"json": ...}'),
]  # fmt: skip


@pytest.mark.parametrize(("what", "url", "body", "status", "kind", "param", "words"), ROWS)
async def test_error_contract(client, engine, what, url, body, status, kind, param, words):
    response = await client.post(url, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, status), what
    assert (error["type"], error["param"]) == (kind, param), what
    assert words in error["message"], what
    assert engine.submitted == []


async def test_error_contract_of_the_server_itself(make_client, engine):
    client = make_client()
    for method, path, status in (("GET", "/nope", 404), ("GET", COMPLETIONS, 405)):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    assert (await client.get("/nope")).json()["detail"] == "Not Found"
    guarded = await make_client(api_keys=("k",)).post(COMPLETIONS, json={"prompt": "a"})
    assert (guarded.status_code, guarded.json()) == (401, {"error": "Unauthorized"})
    engine.refuse = queue_full()
    full = await client.post(COMPLETIONS, json={"prompt": "a"})
    assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
    engine.refuse, engine.fail_at = None, 1
    stream = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    *_, error, done = data_lines(stream.content)
    assert (stream.status_code, json.loads(error)["error"]["code"], done) == (200, 500, "[DONE]")


# --- a default of the model makes no request fail ---


@pytest.mark.parametrize(
    ("url", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})]
)
async def test_a_default_temperature_of_zero_yields_to_n(make_client, engine, url, body):
    engine.model.default_sampling = {"temperature": 0.0, "top_p": 0.5}
    client = make_client()
    assert (await client.post(url, json=body)).status_code == 200
    assert engine.submitted[-1].params.is_greedy
    assert (await client.post(url, json=body | {"n": 2})).status_code == 200
    params = engine.submitted[-1].params
    assert (params.n, params.temperature, params.top_p) == (2, 1.0, 0.5)
    refused = await client.post(url, json=body | {"n": 2, "temperature": 0})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"


@pytest.mark.parametrize(
    ("url", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})]
)
async def test_a_default_length_yields_to_min_tokens(make_client, engine, url, body):
    engine.model.default_sampling = {"max_tokens": 4}
    client = make_client()
    assert (await client.post(url, json=body | {"min_tokens": 8})).status_code == 200
    assert engine.submitted[-1].params.max_tokens == 8
    refused = await client.post(url, json=body | {"min_tokens": 8, "max_tokens": 4})
    assert refused.status_code == 400

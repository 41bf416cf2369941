"""A value that asks for nothing is as if absent: for every field of every endpoint."""

from __future__ import annotations

import json
import typing

import pytest
from anthropic.types.beta.message_create_params import (
    MessageCreateParamsNonStreaming as BetaMessageParams,
)
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as MessageParams
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatParams,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionParams,
)
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming as ResponseParams,
)

from quire.server.dialect_schemas import CountTokensRequest, MessagesRequest, ResponsesRequest
from quire.server.neutral import EMPTY_HAS_MEANING, Neutral, asks_for_nothing
from quire.server.pooling_schemas import (
    EmbeddingChatRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from quire.server.requests import (
    ChatBatchRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Strict,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
ENDPOINTS: dict[str, tuple[str, dict, type[Strict], tuple[type, ...]]] = {
    "completions": ("/v1/completions", {"prompt": "a b"}, CompletionRequest, (CompletionParams,)),
    "chat": (CHAT, {"messages": HI}, ChatCompletionRequest, (ChatParams,)),
    "chat batch": (f"{CHAT}/batch", {"messages": [HI]}, ChatBatchRequest, (ChatParams,)),
    "responses": ("/v1/responses", {"input": "hi"}, ResponsesRequest, (ResponseParams,)),
    "input_tokens": ("/v1/responses/input_tokens", {"input": "hi"}, ResponsesRequest, ()),
    "messages": (
        "/v1/messages", {"messages": HI, "max_tokens": 5}, MessagesRequest,
        (MessageParams, BetaMessageParams),
    ),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": HI}, CountTokensRequest, ()),
    "embeddings": ("/v1/embeddings", {"input": "a b"}, EmbeddingRequest, (EmbeddingCreateParams,)),
    "pooling": ("/pooling", {"messages": HI}, EmbeddingChatRequest, ()),
    "score": ("/score", {"text_1": "a", "text_2": "b"}, ScoreRequest, ()),
    "rerank": ("/rerank", {"query": "a", "documents": ["b"]}, RerankRequest, ()),
    "tokenize": ("/tokenize", {"prompt": "a b"}, TokenizeCompletionRequest, ()),
    "tokenize chat": ("/tokenize", {"messages": HI}, TokenizeChatRequest, ()),
    "detokenize": ("/detokenize", {"tokens": [1]}, DetokenizeRequest, ()),
}  # fmt: skip
"""Name -> path, a body, its model, and the types of the official clients."""

SAMPLED = ("completions", "chat", "chat batch")
CHATS = ("chat", "chat batch")
DIALECTS = ("responses", "messages")
GENERATING = (*SAMPLED, *DIALECTS)
ALL = tuple(ENDPOINTS)

VALUES: list[tuple[tuple[str, ...], str, list[object]]] = [
    (ALL, "model", [""]),
    (ALL, "user", ["", "u"]),
    (ALL, "metadata", [{}]),
    (ALL, "service_tier", ["auto"]),
    (ALL, "safety_identifier", ["", "s"]),
    (ALL, "prompt_cache_key", ["", "k"]),
    (GENERATING, "request_id", [""]),
    (GENERATING, "logit_bias", [{}]),
    (GENERATING, "bad_words", [[]]),
    (GENERATING, "stop_token_ids", [[]]),
    (GENERATING, "structured_outputs", [{}, {"json": None, "regex": None}]),
    (GENERATING, "repetition_detection", [{}, {"max_pattern_size": None}]),
    (GENERATING, "vllm_xargs", [{}]),
    (GENERATING, "verbosity", ["", "medium"]),
    (GENERATING, "guided_choice", [[]]),
    (GENERATING, "guided_regex", [""]),
    (GENERATING, "kv_transfer_params", [{}]),
    (GENERATING, "stream", [False]),
    (GENERATING, "n", [1]),
    (GENERATING, "seed", [-1]),
    (GENERATING, "presence_penalty", [0, 0.0]),
    (GENERATING, "frequency_penalty", [0, 0.0]),
    (GENERATING, "repetition_penalty", [1, 1.0]),
    (GENERATING, "top_k", [0, -1]),
    (GENERATING, "top_p", [1, 1.0]),
    (GENERATING, "min_p", [0, 0.0]),
    (GENERATING, "priority", [0]),
    ((*SAMPLED, "responses"), "stop", ["", []]),
    ((*SAMPLED, "responses"), "response_format", [{"type": "text"}]),
    (SAMPLED, "response_format", [{}, {"type": "text", "json_schema": None}]),
    (SAMPLED, "stream_options", [{}, {"include_usage": False}, {"include_usage": None}]),
    (SAMPLED, "best_of", [1]),
    (SAMPLED, "use_beam_search", [False]),
    (SAMPLED, "length_penalty", [1, 1.0]),
    (SAMPLED, "logprob_token_ids", [[]]),
    (("completions",), "logprobs", [False]),
    (("completions",), "suffix", [""]),
    (("completions",), "echo", [False]),
    (CHATS, "logprobs", [False, 0]),
    ((*CHATS, "responses"), "top_logprobs", [0]),
    (CHATS, "functions", [[]]),
    (CHATS, "function_call", ["none", "auto", ""]),
    (CHATS, "modalities", [[], ["text"]]),
    (CHATS, "echo", [False]),
    (CHATS, "store", [True, False]),
    (CHATS, "documents", [[]]),
    (CHATS, "reasoning_effort", ["", "none"]),
    (CHATS, "chat_template", [""]),
    ((*CHATS, *DIALECTS), "tools", [[]]),
    ((*CHATS, *DIALECTS), "chat_template_kwargs", [{}]),
    ((*CHATS, "responses"), "tool_choice", ["", "none", "auto"]),
    ((*CHATS, "responses"), "parallel_tool_calls", [True, False]),
    (("messages",), "tool_choice", [{}, {"type": "auto"}, {"type": "none"}]),
    (("messages",), "thinking", [{}, {"type": "disabled"}, {"type": "adaptive"}]),
    (("messages",), "system", ["", []]),
    (("messages",), "stop_sequences", [[]]),
    (("messages",), "output_config", [{}, {"format": None, "effort": None}]),
    (("messages",), "mcp_servers", [[]]),
    (("messages",), "context_management", [{}, {"edits": []}]),
    (("messages",), "speed", ["standard"]),
    (("messages",), "betas", [[], ["x"]]),
    (("messages",), "container", [""]),
    (("messages",), "cache_control", [{}]),
    (("responses",), "instructions", [""]),
    (("responses",), "previous_response_id", [""]),
    (("responses",), "conversation", [""]),
    (("responses",), "context_management", [[]]),
    (("responses",), "include", [[]]),
    (("responses",), "truncation", ["disabled"]),
    (("responses",), "background", [False]),
    (("responses",), "text", [{}, {"format": {"type": "text"}}, {"verbosity": None}]),
    (("responses",), "reasoning", [{}, {"effort": None, "summary": None}]),
    (("responses",), "stream_options", [{}, {"include_obfuscation": False}]),
    (("responses",), "client_metadata", [{}, {"a": "b"}]),
    (("responses",), "store", [True]),
    (("embeddings", "pooling"), "encoding_format", ["float"]),
    (("embeddings", "pooling"), "normalize", [True]),
    (("embeddings", "pooling"), "task", ["", "embed"]),
    (("embeddings", "pooling", "score", "rerank"), "instruction", [""]),
    (("rerank",), "top_n", [0]),
]  # fmt: skip
"""Endpoints, a field, and values with which it is as if absent."""


CASES = [
    pytest.param(name, field, value, id=f"{name}-{field}-{json.dumps(value)}")
    for names, field, values in VALUES
    for name in names
    for value in values
]


async def ask(client, engine, url: str, body: dict) -> tuple[object, list]:
    engine.submitted.clear()
    engine.model.chat_template.calls.clear()
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert "warnings" not in answer
    for name in ("id", "created", "created_at", "completed_at", "metadata", "tool_choice", "text",
                 "parallel_tool_calls", "instructions", "output"):  # fmt: skip
        answer.pop(name, None)
    sent = [(each.prompt, each.params, each.placement) for each in engine.submitted]
    return answer, sent


@pytest.mark.parametrize("name", ENDPOINTS)
async def test_every_field_may_be_null(client, engine, name):
    url, body, model, clients = ENDPOINTS[name]
    fields = set(model.model_fields).union(*(params.__annotations__ for params in clients))
    nulls = dict.fromkeys(fields - body.keys())
    assert await ask(client, engine, url, nulls | body) == await ask(client, engine, url, body)


@pytest.mark.parametrize(("name", "field", "value"), CASES)
async def test_as_if_absent(client, engine, name, field, value):
    url, body, _, _ = ENDPOINTS[name]
    body = body | ({"max_tokens": 5} if name in SAMPLED and field != "max_tokens" else {})
    plain = await ask(client, engine, url, body)
    assert await ask(client, engine, url, body | {field: value}) == plain


@pytest.mark.parametrize("logprobs", [False, None, ...])
async def test_no_top_logprobs(client, logprobs):
    body = {"messages": HI, "top_logprobs": 0}
    body |= {} if logprobs is ... else {"logprobs": logprobs}
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200 and response.json()["choices"][0]["logprobs"] is None
    response = await client.post(CHAT, json=body | {"top_logprobs": 1})
    assert response.json()["error"]["param"] == "top_logprobs"
    response = await client.post(CHAT, json=body | {"logprobs": True})
    entries = response.json()["choices"][0]["logprobs"]["content"]
    assert entries and all(entry["top_logprobs"] == [] for entry in entries)


async def test_logprobs_zero_of_completions_asks_for_the_tokens_own(client):
    response = await client.post("/v1/completions", json={"prompt": "a", "logprobs": 0})
    assert response.json()["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(-0.7)


@pytest.mark.parametrize(
    ("url", "field", "value", "param"),
    [
        ("/v1/completions", "allowed_token_ids", [], "allowed_token_ids"),
        ("/v1/completions", "cache_salt", "", "body.cache_salt"),
        ("/v1/completions", "stop", [""], "stop"),
        ("/v1/completions", "stop", {}, "body.stop"),
        ("/v1/completions", "temperature", "", "body.temperature"),
        ("/v1/completions", "prompt", [], "body.prompt"),
        ("/v1/completions", "stream_options", {"include_usage": True}, "stream_options"),
        (CHAT, "web_search_options", {}, "web_search_options"),
        (CHAT, "audio", {}, "audio"),
        (CHAT, "tools", "", "body.tools"),
        ("/score", "text_1", "", "text_1"),
    ],
)
async def test_what_means_something_is_not_dropped(client, engine, url, field, value, param):
    body = {"prompt": "a", "messages": HI, "text_1": "a", "text_2": "b", field: value}
    response = await client.post(url, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("name", GENERATING)
async def test_neutral_values_pass_strict_servers(make_client, name):
    url, body, _, _ = ENDPOINTS[name]
    neutral = {"model": "", "verbosity": "medium", "vllm_xargs": {}, "user": ""}
    response = await make_client(strict_requests=True).post(url, json=body | neutral)
    assert response.status_code == 200, response.text


def test_which_values_ask_for_nothing():
    class Model(Strict):
        a: str | list[str] | None = None
        b: typing.Annotated[list[int] | None, EMPTY_HAS_MEANING] = None
        c: typing.Annotated[int | None, Neutral(0)] = None
        d: str

    def dropped(name: str, value: object) -> bool:
        return asks_for_nothing(Model, {"e": Neutral("x", 1), "a": Neutral("b")}, name, value)

    assert dropped("a", "") and dropped("a", []) and dropped("c", 0)
    assert dropped("e", "x") and dropped("e", 1)
    for name, value in (
        ("a", {}), ("a", "b"), ("b", []), ("c", False), ("c", 0.0), ("c", ""), ("d", ""),
        ("e", ""), ("e", True), ("f", ""),
    ):  # fmt: skip
        assert not dropped(name, value), (name, value)

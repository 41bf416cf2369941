"""Whatever the OpenAPI document allows, and what it does not, is answered without a 5xx.

`scripts/fuzz-http` runs this with 2,000 examples; here there are a few of each.
"""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase
from schemathesis import GenerationMode
from tests.conformance.live import builtin_engine, live_server
from tests.server.scripted_engine import ScriptedEngine

from quire.config import ServerConfig
from quire.server.app import build_app
from quire.server.state import ServerState

EXAMPLES = int(os.environ.get("QUIRE_FUZZ_EXAMPLES", "200"))
"""In all, over the endpoints of both engines."""
FLAGS = {"enable_admin_endpoints": True, "enable_tokenizer_info_endpoint": True}
SLEEP = ("/sleep", "/wake_up", "/is_sleeping")
"""Asleep, a server answers 503."""

SCHEMA = schemathesis.openapi.from_dict(build_app(ServerState(ServerConfig(**FLAGS))).openapi())
OPERATIONS = [
    operation for operation in (result.ok() for result in SCHEMA.get_all_operations())
    if operation.path not in SLEEP
]  # fmt: skip


async def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module", params=["scripted", "builtin"])
def server(request) -> Iterator[httpx.Client]:
    make = scripted_engine if request.param == "scripted" else builtin_engine
    with live_server(make, **FLAGS) as client:
        client.kind = request.param
        yield client


def weight(operation) -> int:
    """Bodies have more to them than paths."""
    return 8 if operation.body else 1


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method}{o.path}")
def test_no_example_makes_a_5xx(server, operation):
    share = EXAMPLES * weight(operation) / sum(map(weight, OPERATIONS))
    share *= 0.7 if server.kind == "scripted" else 0.3
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.body else [None]
    for mode in modes:
        cases = operation.as_strategy(**({"generation_mode": mode} if mode else {}))

        @settings(
            max_examples=max(1, round(share / len(modes))), deadline=None, derandomize=False,
            database=InMemoryExampleDatabase(), suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(cases)
        def check(case) -> None:
            answer = case.call(base_url=str(server.base_url), timeout=60)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert_is_an_error(answer.status_code, answer.content)

        check()


def assert_is_an_error(status: int, content: bytes) -> None:
    error = json.loads(content)["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    if "code" in error:
        assert error["code"] == status
        assert error["param"] is None or isinstance(error["param"], str)


FUNCTION = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA_FORMAT = {"name": "s", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}}
BODIES = {
    "/v1/completions": {
        "prompt": ["a b", "c"], "max_tokens": 3, "n": 2, "logprobs": 1, "stop": ["x"], "seed": 1,
        "logit_bias": {"3": 1.0}, "structured_outputs": {"regex": "a+"}, "stream": True,
        "stream_options": {"include_usage": True}, "repetition_detection": {"max_pattern_size": 2},
        "allowed_token_ids": [1, 2], "bad_words": ["x"], "truncate_prompt_tokens": 3, "echo": True,
    },
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            {"role": "user", "content": "hi"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": SCHEMA_FORMAT}, "max_tokens": 3,
        "logprobs": True, "top_logprobs": 1, "chat_template_kwargs": {"x": 1}, "documents": [{"a": "b"}],
    },
    "/v1/responses": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"role": "user", "content": "b"},
            {"type": "custom_tool_call", "call_id": "d", "name": "p", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "d", "output": [
                {"type": "input_text", "text": "1"}]},
            {"type": "shell_call", "call_id": "e", "action": {"commands": ["ls"]}},
            {"type": "shell_call_output", "call_id": "e", "output": [
                {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
            {"type": "mcp_call", "id": "m", "name": "f", "arguments": "{}", "output": "x", "error": None},
            {"type": "web_search_call", "id": "w"},
        ],
        "instructions": "i", "tools": [
            {"type": "function", **FUNCTION}, {"type": "web_search"},
            {"type": "custom", "name": "p", "description": "d",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}},
            {"type": "namespace", "name": "n", "tools": [{"type": "function", **FUNCTION}]},
        ], "max_output_tokens": 3,
        "tool_choice": {"type": "function", "name": "f"}, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", **SCHEMA_FORMAT}}, "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"], "top_logprobs": 1, "truncation": "auto",
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "s"}], "max_tokens": 3, "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "1"}]},
                {"type": "tool_result", "tool_use_id": "c", "is_error": True},
                {"type": "document", "title": "t", "source": {"type": "text", "data": "x"}},
                {"type": "search_result", "title": "t", "source": "s", "content": [
                    {"type": "text", "text": "x"}]},
            ]},
            {"role": "assistant", "content": [
                {"type": "redacted_thinking", "data": "x"}, {"type": "server_tool_use", "id": "s"},
                {"type": "mcp_tool_use", "id": "m", "name": "f", "input": {}},
                {"type": "mcp_tool_result", "tool_use_id": "m", "content": "x"},
                {"type": "compaction", "content": "x"},
            ]},
        ],
        "tools": [
            {"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]},
            {"type": "bash_20250124", "name": "bash"},
        ],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "u"},
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 2},
    "/score": {"text_1": ["a"], "text_2": ["b", "c"]},
    "/rerank": {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/tokenize": {"messages": [{"role": "user", "content": "hi"}], "return_token_strs": True},
    "/abort_requests": {"request_ids": ["cmpl-x"]},
}  # fmt: skip
JUNK = st.sampled_from(
    [
        None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, 0.5, "", "x", "\x00", "🙂", "auto", "{", "(", [], {},
        [[]], {"a": 1}, {"type": "text"}, {"type": "x"}, {"type": {}}, ["x"] * 300, [1, "a", None], [[[[1]]]],
    ]
)  # fmt: skip


def places(node: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield path
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, object]:
    """A path, and a body that was right before some of it was replaced or taken out."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body: object = {"body": copy.deepcopy(BODIES[path])}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(body) if len(place) > 1]))
        holder = functools.reduce(operator.getitem, way, body)
        if draw(st.integers(0, 4)) == 0:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draw(JUNK))
        if not body["body"]:
            break
    return path, body["body"]


@settings(
    max_examples=max(1, EXAMPLES // 4), deadline=None, suppress_health_check=list(HealthCheck),
    database=InMemoryExampleDatabase(),
)  # fmt: skip
@given(damaged())
def test_no_damaged_body_makes_a_5xx(server, request_):
    path, body = request_
    answer = server.post(path, json=body)
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code >= 400:
        assert_is_an_error(answer.status_code, answer.content)
    elif "text/event-stream" in answer.headers["content-type"]:
        assert '"code":500' not in answer.text and "api_error" not in answer.text, (
            body,
            answer.text,
        )

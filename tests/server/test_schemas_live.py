"""Schemas as clients send them, over HTTP, on the built-in model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

RECORD = {
    "type": "object", "propertyNames": {"type": "string"}, "maxProperties": 1,
    "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99},
}  # fmt: skip
ONE = {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"], "additionalProperties": False,
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "zod record": RECORD,
    "empty propertyNames": ONE | {"propertyNames": {}},
    "uniqueItems false": ONE | {"uniqueItems": False},
    "dependentRequired": ONE | {"dependentRequired": {}},
    "unevaluatedProperties": ONE | {"unevaluatedProperties": True},
    "if alone": ONE | {"if": {"required": ["n"]}},
    "contains": ONE | {"contains": {}, "minContains": 0},
    "draft 7": ONE | {"$schema": "https://json-schema.org/draft-07/schema#"},
    "http 2020-12": ONE | {"$schema": "http://json-schema.org/draft/2020-12/schema"},
    "no draft": ONE | {"$schema": "http://json-schema.org/schema#"},
}
QUESTION = [{"role": "user", "content": "Give me a number."}]
CHAT: dict[str, Any] = {"messages": QUESTION, "max_tokens": 200, "temperature": 0}


def function(schema: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def post(server: Any, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def arguments(path: str, answer: dict[str, Any]) -> Any:
    if path == "/v1/chat/completions":
        return json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    if path == "/v1/responses":
        [call] = [item for item in answer["output"] if item["type"] == "function_call"]
        return json.loads(call["arguments"])
    [call] = [part for part in answer["content"] if part["type"] == "tool_use"]
    return call["input"]


def forced(path: str, schema: dict[str, Any]) -> dict[str, Any]:
    if path == "/v1/chat/completions":
        one = {"tools": [function(schema)], "parallel_tool_calls": False}
        return CHAT | one | {"tool_choice": "required"}
    if path == "/v1/responses":
        tool = {"type": "function", "name": "f", "parameters": schema}
        more = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        return {"input": "Give me a number.", "max_output_tokens": 200} | more
    tool = {"name": "f", "input_schema": schema}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    return {"messages": QUESTION, "max_tokens": 200, "tools": [tool], "tool_choice": choice}


@pytest.mark.parametrize("row", ROWS)
def test_as_response_format(demo_server: Any, row: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": ROWS[row]}}
    answer = post(demo_server, "/v1/chat/completions", CHAT | {"response_format": form})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        bare = {key: value for key, value in ROWS[row].items() if key != "$schema"}
        content = json.loads(choice["message"]["content"])
        jsonschema_rs.Draft202012Validator(bare).validate(content)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_as_a_forced_tool(demo_server: Any, path: str, row: str) -> None:
    schema = ROWS[row] if row != "zod record" else RECORD | {"maxProperties": 0}
    answer = post(demo_server, path, forced(path, schema))
    assert answer.status_code == 200, answer.text
    bare = {key: value for key, value in schema.items() if key != "$schema"}
    jsonschema_rs.Draft202012Validator(bare).validate(arguments(path, answer.json()))


@pytest.mark.parametrize("name", ["json", "int64", "byte", "path", "password"])
def test_unknown_formats_are_named_in_warnings(demo_server: Any, name: str) -> None:
    schema = {"properties": {"a": {"type": "string", "format": name, "maxLength": 3}}} | {
        "type": "object", "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    body = {"prompt": "a", "max_tokens": 40, "structured_outputs": {"json": schema}}
    answer = post(demo_server, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert name in answer.json()["warnings"][0] and name in answer.headers["x-quire-warnings"]
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        answer = post(demo_server, path, forced(path, schema))
        assert answer.status_code == 200, answer.text
        assert name in answer.json()["warnings"][0]


def test_what_cannot_be_enforced_is_named(demo_server: Any) -> None:
    schema = ONE | {"properties": {"tags": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = post(demo_server, "/v1/chat/completions", CHAT | {"response_format": form})
    assert answer.status_code == 400
    assert "uniqueItems at #/properties/tags" in answer.json()["error"]["message"]
    answer = post(
        demo_server, "/v1/chat/completions", CHAT | forced("/v1/chat/completions", schema)
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"

"""Tools as MCP servers define them and as clients pass them on: on every endpoint, by the server's own rules;
the engine scripted."""

from __future__ import annotations

import pytest

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
URLS = pytest.mark.parametrize("url", [CHAT, RESPONSES, MESSAGES])
HI = [{"role": "user", "content": "hi"}]
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.fixture
def engine(engine):
    engine.model.max_model_len = 4096
    engine.model.chat_template.source = "<tool_call> ... </think>"
    return engine


def body(url: str, *functions: dict, **fields: object) -> dict:
    """A request that offers `functions`, as that endpoint has them."""
    if url == CHAT:
        tools = [{"type": "function", "function": function} for function in functions]
        return {"messages": HI, "tools": tools, **fields}
    if url == RESPONSES:
        tools = [{"type": "function", **function} for function in functions]
        return {"input": "hi", "tools": tools, **fields}
    tools = [
        {"input_schema" if key == "parameters" else key: value for key, value in function.items()}
        for function in functions
    ]
    return {"messages": HI, "max_tokens": 5, "tools": tools, **fields}


def required(url: str) -> object:
    return {"type": "any"} if url == MESSAGES else "required"


async def schema_of(client, engine, url: str, function: dict) -> object:
    """What a call that is forced must match."""
    asked = body(url, function, tool_choice=required(url))
    response = await client.post(url, json=asked)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()
    tag = engine.submitted[-1].params.structured_outputs.structural_tag
    [call] = tag["format"]["elements"][1]["tags"]
    return call["content"]["json_schema"]


@URLS
@pytest.mark.parametrize(
    "name",
    [
        "mcp__github__create_issue", "github.create_issue", "docs/search", "list-files", "ns:tool", "f",
        "n" * 128, f"mcp__plugin_{'n' * 100}__{'t' * 128}",
    ],
)  # fmt: skip
async def test_names(client, engine, url, name):
    asked = body(url, {"name": name, "parameters": OBJECT}, tool_choice=required(url))
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
    engine.answer = [call]
    response = await client.post(url, json=asked)
    assert response.status_code == 200, response.text
    answer = response.json()
    if url == CHAT:
        called = answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"]
    else:
        called = answer["output" if url == RESPONSES else "content"][0]["name"]
    assert called == name


@URLS
@pytest.mark.parametrize("name", ["", "two words", "n" * 257, "naïve", "a\nb", None, 5])
async def test_names_that_no_format_can_write(client, url, name):
    response = await client.post(url, json=body(url, {"name": name, "parameters": OBJECT}))
    assert response.status_code == 400
    assert "name" in response.text


PARAMETERS = [
    ({}, {"type": "object"}),
    ({"properties": {}}, {"properties": {}, "type": "object"}),
    ({"type": None, "properties": {}}, {"properties": {}, "type": "object"}),
    (OBJECT | {"type": ["object", "null"]}, OBJECT),
    (OBJECT | {"$schema": "http://json-schema.org/draft-07/schema#"}, ...),
    (OBJECT | {"additionalProperties": False, "required": ["a"]}, ...),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {}}}, ...),
    ({"anyOf": [OBJECT, {"type": "object"}]}, {"anyOf": [OBJECT, {"type": "object"}], "type": "object"}),
]  # fmt: skip


@URLS
@pytest.mark.parametrize(("given", "expected"), PARAMETERS)
async def test_parameters(client, engine, url, given, expected):
    function = {"name": "f", "parameters": given}
    if expected is ...:
        expected = given
    assert await schema_of(client, engine, url, function) == expected


@pytest.mark.parametrize("url", [CHAT, RESPONSES])
@pytest.mark.parametrize("fields", [{}, {"parameters": None}])
async def test_no_parameters_are_any(client, engine, url, fields):
    assert await schema_of(client, engine, url, {"name": "f", **fields}) == {"type": "object"}


@URLS
@pytest.mark.parametrize(
    "fields", [{"strict": None}, {"strict": False}, {"description": None}, {"description": ""}]
)
async def test_what_says_nothing_about_a_tool(client, engine, url, fields):
    asked = body(url, {"name": "f", "parameters": OBJECT, **fields})
    response = await client.post(url, json=asked)
    assert response.status_code == 200 and "warnings" not in response.json()
    [tool] = engine.model.chat_template.tools
    assert tool["function"].keys() - {"description", "strict"} == {"name", "parameters"}
    assert None not in tool["function"].values()


@URLS
@pytest.mark.parametrize("kind", ["string", ["string", "null"], "None", 5])
async def test_parameters_of_no_object_are_refused(client, url, kind):
    function = {"name": "f", "parameters": {"type": kind}}
    response = await client.post(url, json=body(url, function))
    assert response.status_code == 400 and "tools" in response.text


@URLS
async def test_a_set_of_128(client, engine, url):
    functions = [{"name": f"mcp__s__tool_{i}", "parameters": OBJECT} for i in range(128)]
    response = await client.post(url, json=body(url, *functions))
    assert response.status_code == 200
    assert len(engine.model.chat_template.tools) == 128


@URLS
async def test_two_tools_of_one_name_are_refused(client, url):
    function = {"name": "f", "parameters": OBJECT}
    response = await client.post(url, json=body(url, function, function))
    assert response.status_code == 400 and "twice" in response.text

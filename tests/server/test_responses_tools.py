"""/v1/responses as Codex and others use it: tools that are no functions, and every kind of item sent back."""

from __future__ import annotations

import json
import typing

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_input_item_param import ResponseInputItemParam
from openai.types.responses.tool_param import ToolParam
from pydantic import TypeAdapter

from quire.server.responses_input import ACTIONS, LEFT_OUT, OUTPUTS
from quire.server.responses_tools import CUSTOM_PARAMETERS, custom_input, function_name

URL = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
FUNCTION = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": None}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin"'}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit.", "format": GRAMMAR}
SPACE = {
    "type": "namespace", "name": "mcp__docs", "description": "d",
    "tools": [{"type": "function", "name": "find", "parameters": SCHEMA}],
}  # fmt: skip
OTHERS = [
    {"type": kind}
    for kind in (
        "web_search", "web_search_preview", "image_generation", "local_shell", "shell",
        "code_interpreter", "file_search", "mcp", "computer_use_preview", "apply_patch", "tool_search",
        "of_next_year",
    )
]  # fmt: skip
EVENT = TypeAdapter(ResponseStreamEvent)
TEXT = '*** Begin\n+"é😀\\n"'
"""Of a call of a custom tool."""


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
def engine(engine, monkeypatch):
    engine.model.max_model_len = 4096
    template = engine.model.chat_template
    template.source = "<tool_call> ... </think>"
    render = template.render

    def keep(messages, **kwargs):
        template.messages = [dict(message) for message in messages]
        return render(messages, **kwargs)

    monkeypatch.setattr(template, "render", keep)
    return engine


async def create(client, **body) -> Response:
    response = await client.post(URL, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


async def events(client, **body) -> list:
    response = await client.post(URL, json={"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    blocks = [block for block in response.text.split("\n\n") if block]
    return [EVENT.validate_json(block.split("\ndata: ")[1], strict=True) for block in blocks]


async def refused(client, param: str, **body) -> str:
    response = await client.post(URL, json={"input": "hi", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    return error["message"]


def offered(engine) -> list[dict]:
    return [tool["function"] for tool in engine.model.chat_template.tools or []]


# --- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", OTHERS, ids=lambda tool: tool["type"])
async def test_tools_that_are_not_served_are_left_out_with_a_warning(
    client, make_client, engine, tool
):
    engine.answer = [call("look", {"q": "a"})]
    body = {"input": "hi", "tools": [tool, FUNCTION, tool]}
    found = (await client.post(URL, json=body)).json()
    assert found["warnings"] == [f"tools of type {tool['type']} are not served and were left out"]
    assert [function["name"] for function in offered(engine)] == ["look"]
    assert found["output"][0]["type"] == "function_call" and found["tools"] == body["tools"]
    strict = make_client(strict_requests=True)
    assert tool["type"] in await refused(strict, "tools", tools=[tool, FUNCTION])
    assert (await client.post(URL, json={"input": "hi", "tools": [tool]})).status_code == 200
    assert offered(engine) == []


async def test_a_choice_of_what_is_not_served_is_refused(client, engine):
    tools = [{"type": "web_search"}, FUNCTION, PATCH]
    for choice in (
        {"type": "web_search"},
        {"type": "mcp", "server_label": "x"},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]},
    ):
        message = await refused(client, "tool_choice", tools=tools, tool_choice=choice)
        assert choice["type"] in message or "web_search" in message
    message = await refused(client, "tool_choice", tools=tools[:1], tool_choice="required")
    assert "web_search" in message
    assert engine.submitted == []
    both = [{"type": "web_search"}, {"type": "function", "name": "look"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": both}
    await create(client, tools=tools, tool_choice=allowed)
    grammar = json.dumps(engine.submitted[-1].params.structured_outputs.structural_tag)
    assert "look" in grammar and "apply_patch" not in grammar
    for choice in ("auto", "none"):
        await create(client, tools=tools[:1], tool_choice=choice)


async def test_a_custom_tool_is_a_function_with_a_text(client, engine):
    engine.answer = [call("apply_patch", {"input": TEXT})]
    found = await create(client, tools=[PATCH])
    [item] = found.output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "apply_patch", TEXT)
    assert item.id.startswith("ctc_") and item.call_id and not item.model_extra
    [function] = offered(engine)
    assert function["parameters"] == CUSTOM_PARAMETERS
    assert (
        function["description"].startswith("Edit.")
        and GRAMMAR["definition"] in function["description"]
    )
    assert "not enforced" in found.model_extra["warnings"][0]
    plain = await create(client, tools=[PATCH | {"format": {"type": "text"}}])
    assert "warnings" not in plain.model_extra and offered(engine)[0]["description"] == "Edit."
    named = {"type": "custom", "name": "apply_patch"}
    await create(client, tools=[PATCH, FUNCTION], tool_choice=named)
    grammar = json.dumps(engine.submitted[-1].params.structured_outputs.structural_tag)
    assert "apply_patch" in grammar and "look" not in grammar


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("escaped", [True, False])
async def test_a_custom_call_in_a_stream(client, engine, size, escaped):
    arguments = json.dumps({"input": TEXT}, ensure_ascii=escaped)
    text = f'<tool_call>\n{{"name": "apply_patch", "arguments": {arguments}}}\n</tool_call>'
    engine.answer = [text[i : i + size] for i in range(0, len(text), size)]
    found = await events(client, tools=[PATCH])
    deltas = [e.delta for e in found if e.type == "response.custom_tool_call_input.delta"]
    [done] = [e for e in found if e.type == "response.custom_tool_call_input.done"]
    assert "".join(deltas) == done.input == TEXT and (size > 1 or len(deltas) == len(TEXT))
    [added] = [e for e in found if e.type == "response.output_item.added"]
    assert (added.item.type, added.item.input, added.item.id) == (
        "custom_tool_call",
        "",
        done.item_id,
    )
    [item] = found[-1].response.output
    assert (item.type, item.input) == ("custom_tool_call", TEXT)
    assert not any("function_call" in e.type for e in found)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "ab', "ab"), ('{"input": "ab\\', "ab"), ('{"inp', '{"inp'), ("", ""),
        ('{"patch": "a"}', '{"patch": "a"}'), ('{"input": 5}', '{"input": 5}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_a_custom_call_that_is_cut_or_wrong(client, engine, arguments, text, stream):
    """And sent back, it is taken."""
    engine.answer = [f'<tool_call>\n{{"name": "apply_patch", "arguments": {arguments}']
    engine.finish_reason = "length"
    if stream:
        found = (await events(client, tools=[PATCH]))[-1].response
    else:
        found = await create(client, tools=[PATCH])
    assert found.status == "incomplete"
    calls = [item for item in found.output if item.type == "custom_tool_call"]
    if calls or arguments:
        assert calls[0].input == text
    items = [item.model_dump() for item in found.output]
    items += [
        {"type": "custom_tool_call_output", "call_id": c.call_id, "output": "no"} for c in calls
    ]
    await create(client, tools=[PATCH], input=[{"role": "user", "content": "hi"}, *items])


def test_the_input_so_far():
    whole = json.dumps({"input": TEXT})
    before = ""
    for end in range(len(whole) + 1):
        text = custom_input(whole[:end]) or ""
        assert text.startswith(before)
        before = text
    assert before == TEXT


async def test_a_namespace(client, engine):
    engine.answer = [call("mcp__docs__find", {"q": "a"}), call("apply_patch", {"input": "x"})]
    inner = SPACE | {"name": "functions", "tools": [PATCH]}
    found = await create(client, tools=[SPACE, inner])
    assert [function["name"] for function in offered(engine)] == ["mcp__docs__find", "apply_patch"]
    first, second = found.output
    assert (first.type, first.name, first.namespace) == ("function_call", "find", "mcp__docs")
    assert (second.type, second.name, second.namespace) == (
        "custom_tool_call", "apply_patch", "functions",
    )  # fmt: skip
    done = [
        e.item for e in await events(client, tools=[SPACE, inner]) if e.type.endswith("item.done")
    ]
    assert [(item.name, item.namespace) for item in done] == [
        ("find", "mcp__docs"), ("apply_patch", "functions"),
    ]  # fmt: skip
    choice = {"type": "function", "name": "find", "namespace": "mcp__docs"}
    await create(client, tools=[SPACE, FUNCTION], tool_choice=choice)
    assert "mcp__docs__find" in str(engine.submitted[-1].params.structured_outputs.structural_tag)
    sent = [item.model_dump() for item in found.output]
    await create(client, tools=[SPACE, inner], input=[{"role": "user", "content": "a"}, *sent])
    [_, answer] = engine.model.chat_template.messages
    assert [c["function"]["name"] for c in answer["tool_calls"]] == [
        "mcp__docs__find",
        "apply_patch",
    ]
    assert function_name("find", "mcp__docs__") == "mcp__docs__find"


# --- items ----------------------------------------------------------------------------------------

ITEMS = {
    "web_search_call": {
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "a"},
    },
    "image_generation_call": {"id": "ig_1", "status": "completed", "result": "aGk="},
    "file_search_call": {"id": "fs_1", "status": "completed", "queries": ["a"], "results": None},
    "code_interpreter_call": {
        "id": "ci_1",
        "status": "completed",
        "code": "1",
        "container_id": "c",
    },
    "mcp_list_tools": {"id": "mcpl_1", "server_label": "s", "tools": []},
    "compaction": {"id": "cmp_1", "encrypted_content": "x"},
    "tool_search_call": {"id": "ts_1", "arguments": {}},
}


@pytest.mark.parametrize("kind", ITEMS)
async def test_items_that_are_not_served_are_left_out_with_a_warning(
    client, make_client, engine, kind
):
    items = [
        {"role": "user", "content": "a"},
        {"type": kind, **ITEMS[kind]},
        {"role": "user", "content": "b"},
    ]
    found = await create(client, input=items)
    assert found.model_extra["warnings"] == [
        f"items of type {kind} are not served and were left out"
    ]
    assert [m["content"] for m in engine.model.chat_template.messages] == ["a", "b"]
    again = await create(client, input="c", previous_response_id=found.id)
    assert "warnings" not in again.model_extra, "the client was told when it sent the item"
    strict = make_client(strict_requests=True)
    assert kind in await refused(strict, "input", input=items)


CALLS = [
    (
        [
            {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"},
        ],
        "apply_patch", {"input": "*** Begin"}, "Done",
    ),
    (
        [
            {"type": "local_shell_call", "id": "x", "call_id": "c", "status": "completed",
             "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None}},
            {"type": "local_shell_call_output", "id": "c", "output": "a.py"},
        ],
        "local_shell", {"command": ["ls"], "env": {}}, "a.py",
    ),
    (
        [
            {"type": "local_shell_call", "id": None, "call_id": "c", "status": "completed",
             "action": {"type": "exec", "command": ["ls"]}},
            {"type": "function_call_output", "call_id": "c", "output": "a.py"},
        ],
        "local_shell", {"command": ["ls"]}, "a.py",
    ),
    (
        [
            {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls", "no"]}},
            {"type": "shell_call_output", "call_id": "c", "output": [
                {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
                {"stdout": "", "stderr": "what?", "outcome": {"type": "timeout"}}]},
        ],
        "shell", {"commands": ["ls", "no"]}, "a.py\nexit code 0\nwhat?\ntimeout",
    ),
    (
        [
            {"type": "apply_patch_call", "call_id": "c", "status": "completed",
             "operation": {"type": "delete_file", "path": "a"}},
            {"type": "apply_patch_call_output", "call_id": "c", "status": "failed"},
        ],
        "apply_patch", {"type": "delete_file", "path": "a"}, "",
    ),
    (
        [{"type": "mcp_call", "id": "c", "name": "find", "server_label": "docs", "arguments": '{"q": "a"}',
          "output": "found", "error": None}],
        "find", '{"q": "a"}', "found",
    ),
    (
        [
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{'q': 1}"},
            {"type": "function_call_output", "call_id": "c", "output": None},
        ],
        "look", "{'q': 1}", "",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("items", "name", "arguments", "result"), CALLS)
async def test_calls_and_results_stay(client, engine, items, name, arguments, result):
    found = await create(client, input=[{"role": "user", "content": "a"}, *items])
    assert "warnings" not in found.model_extra
    function = {"name": name, "arguments": arguments}
    assert engine.model.chat_template.messages[1:] == [
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": result},
    ]


async def test_reasoning_of_others(client, engine):
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    found = await create(client, input=[{"role": "user", "content": "a"}, sealed])
    assert "encrypted_content" in found.model_extra["warnings"][0]
    found = await create(
        client, input=[{"role": "user", "content": "a"}, sealed | {"encrypted_content": None}]
    )
    assert "warnings" not in found.model_extra


@pytest.mark.parametrize("typed", [True, False])
async def test_references_are_what_they_refer_to(client, make_client, engine, typed):
    """As the AI SDK sends them while `store` is true."""
    engine.answer = ["<think>", "Hm", "</think>", call("look", {"q": "a"})]
    first = await create(
        client, input=[{"role": "user", "content": "a", "id": "mine"}], tools=[FUNCTION]
    )
    kind = {"type": "item_reference"} if typed else {"type": None}
    items = [{"id": "mine", **kind}, *({"id": item.id, **kind} for item in first.output)]
    items.append(
        {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "b"}
    )
    second = await create(client, input=items, tools=[FUNCTION])
    messages = engine.model.chat_template.messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["reasoning_content"] == "Hm" and messages[1]["tool_calls"]
    listed = (await client.get(f"{URL}/{second.id}/input_items?order=asc")).json()["data"]
    assert listed[0]["content"][0]["text"] == "a"
    for ids in (["nope"], ["mine", "nope"]):
        sent = [{"type": "item_reference", "id": name} for name in ids]
        response = await client.post(URL, json={"input": sent})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (404, "input") and "nope" in error[
            "message"
        ]


async def test_references_of_another_key_are_unknown(make_client, engine):
    client = make_client(api_keys=["a", "b"])
    body = {"input": [{"role": "user", "content": "secret", "id": "mine"}]}
    await client.post(URL, json=body, headers={"authorization": "Bearer a"})
    asked = {"input": [{"type": "item_reference", "id": "mine"}]}
    for key, status in (("a", 200), ("b", 404)):
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.post(URL, json=asked, headers=headers)).status_code == status


def _types(union: object) -> set[str]:
    found = set()
    for member in typing.get_args(union):
        hint = typing.get_type_hints(member).get("type")
        found |= {kind for kind in typing.get_args(hint) if isinstance(kind, str)}
    return found


def test_every_item_of_the_client_is_known():
    known = {
        "message",
        "reasoning",
        "function_call",
        "custom_tool_call",
        "mcp_call",
        "item_reference",
    }
    theirs = _types(ResponseInputItemParam)
    assert {"message", "web_search_call", "shell_call"} <= theirs
    assert theirs <= known | LEFT_OUT | OUTPUTS | set(ACTIONS)
    assert {"function", "custom", "namespace"} <= _types(ToolParam)


async def test_codex(client, engine):
    """A session in Codex's shape: streamed, stateless, everything sent back; asked by the openai client."""
    request = {
        "model": "tiny",
        "instructions": "You are a coding agent.",
        "tools": [
            {"type": "function", "name": "exec_command", "description": "Run.", "strict": False,
             "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}},
                            "required": ["cmd"], "additionalProperties": False}},
            PATCH, {"type": "web_search", "external_web_access": True}, SPACE,
        ],
        "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False, "stream": True, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k", "text": {"verbosity": "medium"}, "service_tier": "auto",
    }  # fmt: skip
    items: list[dict] = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Sandboxed."}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
    ]
    turns = [
        ["<think>", "Look.", "</think>", call("exec_command", {"cmd": "ls"})],
        [call("mcp__docs__find", {"q": "x"})],
        ["Editing.", call("apply_patch", {"input": TEXT})],
        ["Done."],
    ]
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=client, max_retries=0
    ) as sdk:
        for turn in turns:
            engine.answer = turn
            sent = {"input": items, "extra_body": {"client_metadata": {"a": "b"}}}
            stream = await sdk.responses.create(**request, **sent)
            done = [e.item async for e in stream if e.type == "response.output_item.done"]
            for item in done:
                items.append(item.model_dump(exclude_none=True))
                if item.type.endswith("_call"):
                    kind = f"{item.type}_output"
                    items.append({"type": kind, "call_id": item.call_id, "output": "ok"})
    messages = engine.model.chat_template.messages
    assert [message["role"] for message in messages] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "assistant", "tool",
    ]  # fmt: skip
    calls = [c["function"] for m in messages for c in m.get("tool_calls", ())]
    assert calls == [
        {"name": "exec_command", "arguments": '{"cmd": "ls"}'},
        {"name": "mcp__docs__find", "arguments": '{"q": "x"}'},
        {"name": "apply_patch", "arguments": {"input": TEXT}},
    ]
    assert messages[2]["reasoning_content"] == "Look." and messages[6]["content"] == "Editing."
    assert items[-1]["content"][0]["text"] == "Done."


@pytest.mark.parametrize("junk", [[], {}, 5, True, [[1]], {"a": []}])
@pytest.mark.parametrize(
    "field", ["type", "id", "call_id", "name", "namespace", "output", "action"]
)
async def test_items_of_the_wrong_types_are_refused(client, field, junk):
    """None is an error of the server's."""
    for items, *_ in CALLS:
        for index in range(len(items)):
            damaged = [dict(item) for item in items]
            damaged[index][field] = junk
            response = await client.post(URL, json={"input": damaged})
            assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("junk", [[], {}, 5, True, [[1]], {"a": []}])
@pytest.mark.parametrize("field", ["type", "name", "description", "format", "tools", "parameters"])
async def test_tools_of_the_wrong_types_are_refused(client, field, junk):
    for tool in (FUNCTION, PATCH, SPACE):
        for choice in ("auto", {"type": junk}, {"type": "custom", "name": junk}):
            body = {"input": "hi", "tools": [tool | {field: junk}], "tool_choice": choice}
            response = await client.post(URL, json=body)
            assert response.status_code in (200, 400), response.text

"""/v1/messages as Claude Code and others use it: what changes nothing, what is left out, what is kept."""

from __future__ import annotations

import itertools
import json
import typing

import anthropic
import httpx2
import pytest
from anthropic.types.beta import BetaContentBlockParam

from quire.server.billing_header import NAME, without_header, without_header_messages
from quire.server.messages_input import (
    CALLS,
    LEFT_OUT,
    LEFT_OUT_SUFFIX,
    RESULTS,
    SEALED,
    TEXT_BLOCKS,
)

URL = "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "d", "input_schema": SCHEMA}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


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


def header(number: int) -> str:
    return f"{NAME} cc_version=2.1.{number}.7b4; cc_entrypoint=cli; cch=eb6c{number};"


async def post(client, path: str = URL, status: int = 200, headers=None, **body) -> dict:
    sent = {"messages": HI, **({"max_tokens": 50} if path.startswith(URL) else {}), **body}
    response = await client.post(path, json=sent, headers=headers)
    assert response.status_code == status, response.text
    return response.json()


def rendered(engine) -> list[dict]:
    return engine.model.chat_template.messages


# --- the billing header ---------------------------------------------------------------------------

RULES = {"type": "text", "text": "Be kind.", **EPHEMERAL}
SYSTEMS = [
    [{"type": "text", "text": header(1)}, RULES],
    [{"type": "text", "text": header(1) + "\n"}, RULES],
    [{"type": "text", "text": header(1), **EPHEMERAL}, RULES],
    [RULES, {"type": "text", "text": header(1)}],
    [{"type": "text", "text": f"{NAME} 7b4eb6c6"}, RULES],
    f"{header(1)}\nBe kind.",
    f"{header(1)}\n\nBe kind.",
    f"{header(1)}\r\n{header(2)}\r\nBe kind.",
]


@pytest.mark.parametrize("system", SYSTEMS)
async def test_the_billing_header_is_left_out(client, engine, system):
    await post(client, system=system)
    assert rendered(engine)[0] == {"role": "system", "content": "Be kind."}
    counted = await post(client, f"{URL}/count_tokens", system=system)
    assert counted["input_tokens"] == len(engine.submitted[0].prompt)
    inline = [{"role": "system", "content": system}, *HI]
    await post(client, messages=inline)
    if system[0] is not RULES:
        assert rendered(engine)[0] == {"role": "system", "content": "Be kind."}
        await post(client, "/v1/chat/completions", messages=inline)
        content = rendered(engine)[0]["content"]
        assert content == "Be kind." or [part["text"] for part in content] == ["Be kind."]


async def test_a_billing_header_alone_is_no_system_message(client, engine):
    for system in (header(1), [{"type": "text", "text": header(1)}]):
        await post(client, system=system)
        assert rendered(engine) == HI
    await post(
        client, "/v1/chat/completions", messages=[{"role": "system", "content": header(1)}, *HI]
    )
    assert rendered(engine) == HI
    body = {"input": "hi", "instructions": f"{header(1)}\nBe kind."}
    await client.post("/v1/responses", json=body)
    assert rendered(engine)[0]["content"] == "Be kind."


@pytest.mark.parametrize(
    "text",
    [
        f"{NAME} is what Claude Code sends.", f"The line {header(1)}", NAME, f"{NAME} ", "",
        f"{NAME} a=b; and then?", "x-anthropic-billing: a=b;",
    ],
)  # fmt: skip
async def test_text_that_mentions_the_header_stays(client, engine, text):
    assert without_header(text) == text
    await post(client, system=[{"type": "text", "text": text}, RULES])
    assert rendered(engine)[0]["content"] == f"{text}\nBe kind."


def test_only_system_messages_lose_it():
    kept = [{"role": role, "content": header(1)} for role in ("user", "assistant", "tool")]
    assert without_header_messages(kept) == kept


# --- habits ---------------------------------------------------------------------------------------


async def test_a_request_of_claude_code(client, engine):
    body = {
        "model": "tiny", "max_tokens": 32, "stream": False,
        "system": [{"type": "text", "text": header(1)}, {"type": "text", "text": "You code.", **EPHEMERAL}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "<system-reminder>Today.</system-reminder>"},
                {"type": "text", "text": "Fix it.", **EPHEMERAL},
            ]},
        ],
        "tools": [TOOL | EPHEMERAL | {"eager_input_streaming": True, "input_examples": [{"city": "x"}],
                                      "defer_loading": False, "allowed_callers": ["direct"]}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
        "metadata": {"user_id": "user_abc_account__session_def"},
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
        "context_management": {"edits": []}, "mcp_servers": [], "service_tier": "auto",
        "temperature": 1, "cache_control": {"type": "ephemeral", "ttl": "1h"},
    }  # fmt: skip
    headers = {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
               "anthropic-version": "2023-06-01", "x-app": "cli"}  # fmt: skip
    found = await post(client, f"{URL}?beta=true", headers=headers, **body)
    assert "warnings" not in found
    assert [message["role"] for message in rendered(engine)] == ["system", "user"]
    [tool] = engine.model.chat_template.tools
    assert tool["function"].keys() == {"name", "description", "parameters"}
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    found = await post(client, **body | {"context_management": edits})
    assert found["warnings"] == ["field context_management has no effect"]


async def test_output_format_is_the_older_place_of_the_format(client, engine):
    form = {"type": "json_schema", "schema": SCHEMA}
    await post(client, output_format=form)
    assert engine.submitted[0].params.structured_outputs.json == SCHEMA


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ],
    ids=lambda tool: tool["type"],
)  # fmt: skip
async def test_tools_of_anthropics_are_left_out_with_a_warning(client, make_client, engine, tool):
    found = await post(client, tools=[tool, TOOL | {"type": "custom"}])
    assert found["warnings"] == [f"tools of type {tool['type']} are not served and were left out"]
    [offered] = engine.model.chat_template.tools
    assert offered["function"]["name"] == "weather"
    await post(client, tools=[tool], tool_choice={"type": "auto"})
    assert not engine.model.chat_template.tools
    for body in (
        {"tools": [tool], "tool_choice": {"type": "any"}},
        {"tools": [tool, TOOL], "tool_choice": {"type": "tool", "name": tool.get("name", "-")}},
    ):
        error = (await post(client, status=400, **body))["error"]["message"]
        assert "tool_choice" in error and (tool["type"] in error or "name" not in tool)
    await post(make_client(strict_requests=True), status=400, tools=[tool, TOOL])


async def test_blocks_of_anthropics_servers_are_left_out_with_a_warning(client, engine):
    messages = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "EqQ="},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."},
            {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "a"}},
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
            {"type": "text", "text": "Found.", "citations": None},
        ]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    found = await post(client, messages=messages)
    assert found["warnings"] == [
        f"blocks of type {kind} are not served and were left out"
        for kind in ("server_tool_use", "web_search_tool_result")
    ]
    assert rendered(engine) == [
        *HI, {"role": "assistant", "reasoning_content": "Hm", "content": "I look.Found."},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip


RESULTS_OF_TOOLS = [
    ({"content": "sun"}, "sun"), ({"content": [{"type": "text", "text": "sun", **EPHEMERAL}]}, "sun"),
    ({}, ""), ({"content": None}, ""), ({"content": []}, ""), ({"content": ""}, ""),
    ({"content": "no such city", "is_error": True}, "no such city"), ({"is_error": True}, "Error"),
    ({"content": "", "is_error": True}, "Error"), ({"content": "sun", "is_error": None}, "sun"),
    ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
    ({"content": [{"type": "tool_reference", "tool_name": "weather"}]}, "weather"),
    ({"content": [{"type": "search_result", "title": "T", "source": "u",
                   "content": [{"type": "text", "text": "x"}]}]}, "T\nu\nx"),
    ({"content": [{"type": "document", "title": None,
                   "source": {"type": "text", "media_type": "text/plain", "data": "x"}}]}, "x"),
]  # fmt: skip


@pytest.mark.parametrize(("result", "text"), RESULTS_OF_TOOLS)
async def test_results_of_tools(client, engine, result, text):
    messages = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "text", "text": ""},
            {"type": "tool_use", "id": "c", "name": "weather", "input": {}, **EPHEMERAL}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", **result}]},
    ]  # fmt: skip
    found = await post(client, messages=messages, tools=[TOOL])
    assert "warnings" not in found
    assert rendered(engine)[-1] == {"role": "tool", "tool_call_id": "c", "content": text}


async def test_an_image_in_a_result_is_refused_by_name(client):
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    for image in ({"type": "image", "source": source}, {"type": "document", "source": source}):
        result = {"type": "tool_result", "tool_use_id": "c", "content": [image]}
        found = await post(client, status=400, messages=[{"role": "user", "content": [result]}])
        assert "messages[0].content[0].content[0]" in found["error"]["message"]


async def test_calls_of_mcp_servers_and_summaries_stay(client, engine):
    messages = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "compaction", "content": "Before: nothing."},
            {"type": "mcp_tool_use", "id": "m", "name": "find", "server_name": "s", "input": {"q": "a"}},
            {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False,
             "content": [{"type": "text", "text": "b"}]},
            {"type": "text", "text": "b it is"},
        ]},
        {"role": "user", "content": [
            {"type": "document", "title": "T", "source": {"type": "content", "content": "x"}}]},
    ]  # fmt: skip
    await post(client, messages=messages)
    function = {"name": "find", "arguments": {"q": "a"}}
    assert rendered(engine)[1:] == [
        {"role": "assistant", "content": "Before: nothing.",
         "tool_calls": [{"id": "m", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "m", "content": "b"},
        {"role": "assistant", "content": "b it is"},
        {"role": "user", "content": [{"type": "text", "text": "T"}, {"type": "text", "text": "x"}]},
    ]  # fmt: skip


def kinds(annotation: object) -> set[str]:
    """The values of `type`, of all members of a union."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    if hasattr(annotation, "model_fields"):
        return kinds(annotation.model_fields["type"].annotation)
    if typing.is_typeddict(annotation):
        return kinds(typing.get_type_hints(annotation)["type"])
    return set().union(*(kinds(member) for member in typing.get_args(annotation)))


def test_every_block_and_tool_of_the_client_is_known():
    """Read, left out, or refused as models read text."""
    known = {*TEXT_BLOCKS, *CALLS, *RESULTS, *SEALED, *LEFT_OUT}
    known |= {"thinking", "compaction", "search_result", "document", "image"}
    theirs = kinds(BetaContentBlockParam)
    assert {"text", "tool_use", "web_search_tool_result"} <= theirs
    assert {kind for kind in theirs if not kind.endswith(LEFT_OUT_SUFFIX)} <= known


# --- a conversation -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_loop_with_the_clients_own_objects(client, engine, stream):
    transport = httpx2.ASGITransport(app=client._transport.app)
    messages: list = [{"role": "user", "content": "Weather?"}]
    body = {"model": "tiny", "max_tokens": 90, "tools": [TOOL]}
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        anthropic.AsyncAnthropic(
            base_url="http://test", api_key="k", http_client=http, max_retries=0
        ) as sdk,
    ):
        for number in range(3):
            system = [{"type": "text", "text": header(number)}, {"type": "text", "text": "Kind."}]
            last = number == 2
            engine.answer = (
                ["It is ", "sunny."] if last else ["<think>", "Hm", "</think>", "See. ", CALL]
            )
            asked = {**body, "system": system, "messages": messages}
            if stream:
                async with sdk.messages.stream(**asked) as events:
                    message = await events.get_final_message()
            else:
                message = await sdk.messages.create(**asked)
            messages.append({"role": message.role, "content": message.content})
            uses = [block for block in message.content if block.type == "tool_use"]
            assert (
                message.stop_reason == ("end_turn" if last else "tool_use") and bool(uses) != last
            )
            if uses:
                results = [
                    {"type": "tool_result", "tool_use_id": use.id, "content": "sun"} for use in uses
                ]
                messages.append({"role": "user", "content": results})
    prompts = [engine.model.tokenizer.decode(each.prompt) for each in engine.submitted]
    assert [m["role"] for m in rendered(engine)] == ["system", "user", *["assistant", "tool"] * 2]
    assert rendered(engine)[2]["reasoning_content"] == "Hm"
    end = engine.model.chat_template.prompt_end
    assert all(
        after.startswith(before.removesuffix(end)) for before, after in itertools.pairwise(prompts)
    )


@pytest.mark.parametrize("end", range(0, len(CALL), 4))
@pytest.mark.parametrize("before", ["", "See. ", "<think>\nHm\n</think>\n\n"])
async def test_an_answer_cut_anywhere_may_be_sent_back(client, engine, before, end):
    engine.answer, engine.finish_reason = [before + CALL[:end]], "length"
    found = await post(client, tools=[TOOL])
    messages: list = [*HI, {"role": "assistant", "content": found["content"]}]
    uses = [block for block in found["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "cut"} for use in uses]
    messages.append({"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]})
    await post(client, tools=[TOOL], messages=json.loads(json.dumps(messages)))


@pytest.mark.parametrize("junk", [[], {}, 5, True, [[1]], {"a": []}])
async def test_blocks_and_tools_of_the_wrong_types_are_refused(client, junk):
    """None is an error of the server's."""
    blocks = [
        {"type": junk}, {"type": "tool_use", "id": junk, "name": junk, "input": junk},
        {"type": "compaction", "content": junk}, {"type": "document", "title": junk, "source": junk},
        {"type": "document", "source": {"type": junk, "data": junk}},
        {"type": "document", "source": {"type": "text", "data": junk}},
        {"type": "search_result", "title": junk, "content": junk},
        {"type": "mcp_tool_result", "tool_use_id": "c", "content": junk, "is_error": junk},
    ]  # fmt: skip
    bodies = [
        {"messages": [{"role": role, "content": [block]}]}
        for block in blocks
        for role in ("user", "assistant")
    ]
    bodies += [{"tools": [tool]} for tool in ({"type": junk}, {"type": "bash_1", "name": junk})]
    bodies += [{"tools": [TOOL], "tool_choice": {"type": "tool", "name": junk}}]
    bodies += [{"system": [{"type": "text", "text": junk}]}, {"output_format": {"type": junk}}]
    for body in bodies:
        response = await client.post(URL, json={"messages": HI, "max_tokens": 5, **body})
        assert response.status_code in (200, 400), (body, response.text)

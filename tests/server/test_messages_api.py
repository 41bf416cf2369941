"""/v1/messages: asked by the `anthropic` client, whose types are checked strictly; the engine scripted."""

from __future__ import annotations

import json

import anthropic
import httpx2
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import BaseModel, TypeAdapter
from scripted_engine import queue_full

from quire.server import unsupported
from quire.server.dialect_schemas import MessagesRequest

URL = "/v1/messages"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "d", "input_schema": SCHEMA}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
MIXED = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"
HI = [{"role": "user", "content": "hi"}]
EVENT = TypeAdapter(RawMessageStreamEvent)
OURS = {"warnings"}


@pytest.fixture
def engine(engine, monkeypatch):
    engine.model.max_model_len = 4096
    template = engine.model.chat_template
    template.source = "<tool_call> ... </think>"
    render = template.render

    def keep(messages, **kwargs):
        template.messages = [dict(message) for message in messages]
        template.tools = kwargs.get("tools")
        return render(messages, **kwargs)

    monkeypatch.setattr(template, "render", keep)
    return engine


@pytest.fixture
async def sdk(client):
    transport = httpx2.ASGITransport(app=client._transport.app)  # this client takes no other httpx
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        anthropic.AsyncAnthropic(
            base_url="http://test", api_key="none", http_client=http, max_retries=0
        ) as found,
    ):
        yield found


def nothing_unknown(model: BaseModel) -> None:
    assert set(model.model_extra or {}) <= OURS, model.model_extra
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                nothing_unknown(item)


async def create(client, **body) -> Message:
    response = await client.post(URL, json={"messages": HI, "max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    found = Message.model_validate_json(response.content, strict=True)
    nothing_unknown(found)
    return found


async def events(client, **body) -> list:
    sent = {"messages": HI, "max_tokens": 50, "stream": True, **body}
    response = await client.post(URL, json=sent)
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n")[:-1]:
        if not block:
            continue
        name, data = block.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        if payload["type"] in ("ping", "error"):
            found.append(payload)
            continue
        found.append(EVENT.validate_python(payload, strict=True))
        nothing_unknown(found[-1])
    return found


async def refused(client, kind: str, status: int = 400, headers=None, **body) -> str:
    sent = {"messages": HI, "max_tokens": 50, **body}
    response = await client.post(URL, json=sent, headers=headers)
    assert response.status_code == status, response.text
    answer = ErrorResponse.model_validate_json(response.content, strict=True)
    assert answer.error.type == kind and answer.request_id == response.headers["x-request-id"]
    return answer.error.message


def blocks(content) -> list:
    out = []
    for block in content:
        if block.type == "tool_use":
            out.append((block.name, block.input))
        else:
            out.append((block.type, getattr(block, block.type)))
    return out


# --- shapes ---------------------------------------------------------------------------------------


async def test_an_answer(sdk, client, engine):
    found = await create(
        client, system="Kind.", temperature=0.5, top_k=3, metadata={"user_id": "u"}
    )
    assert found.id.startswith("msg_") and (found.role, found.model) == ("assistant", "tiny")
    assert blocks(found.content) == [("text", "Hello there, world!")]
    assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)
    [sent] = engine.submitted
    assert (sent.params.temperature, sent.params.top_k, sent.params.max_tokens) == (0.5, 3, 50)
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == len(sent.prompt)
    assert (found.usage.cache_read_input_tokens, found.usage.output_tokens) == (2, 5)
    assert engine.model.chat_template.messages[0] == {"role": "system", "content": "Kind."}
    again = await sdk.messages.create(model="tiny", max_tokens=50, messages=HI)
    assert blocks(again.content) == blocks(found.content)


async def test_the_events(client, engine):
    engine.answer = [MIXED[i : i + 4] for i in range(0, len(MIXED), 4)]
    found = await events(client, tools=[TOOL])
    kinds = [e["type"] if isinstance(e, dict) else e.type for e in found]
    once = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert once == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    start = found[0].message
    assert start.content == [] and start.stop_reason is None
    assert start.usage.cache_read_input_tokens == 2 and start.usage.output_tokens == 0
    starts = [e for e in found[2:] if e.type == "content_block_start"]
    assert [e.index for e in starts] == [0, 1, 2]
    assert blocks([e.content_block for e in starts]) == [
        ("thinking", ""),
        ("text", ""),
        ("weather", {}),
    ]
    end = found[-2]
    assert end.delta.stop_reason == "tool_use"
    assert end.usage.output_tokens == len(engine.answer)


@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_a_stream_is_the_whole(sdk, engine, size):
    engine.answer = [MIXED[i : i + size] for i in range(0, len(MIXED), size)]
    body = {"model": "tiny", "max_tokens": 500, "messages": HI, "tools": [TOOL]}
    whole = await sdk.messages.create(**body)
    assert blocks(whole.content) == [
        ("thinking", "Hm."), ("text", "Let me see."), ("weather", {"city": "Paris"}),
    ]  # fmt: skip
    assert whole.stop_reason == "tool_use"
    async with sdk.messages.stream(**body) as stream:
        final = await stream.get_final_message()
    assert blocks(final.content) == blocks(whole.content)
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_reasons(client, engine, stream, monkeypatch):
    async def reason(**body):
        if stream:
            delta = (await events(client, **body))[-2].delta
            return delta.stop_reason, delta.stop_sequence
        found = await create(client, **body)
        return found.stop_reason, found.stop_sequence

    engine.finish_reason = "length"
    assert await reason() == ("max_tokens", None)
    engine.finish_reason = "stop"
    part = type(engine.streams[0])._part

    def stopped(self, *args):
        output = part(self, *args)
        output.stop_reason = "END" if output.finish_reason else None
        return output

    monkeypatch.setattr(type(engine.streams[0]), "_part", stopped)
    assert await reason(stop_sequences=["END"]) == ("stop_sequence", "END")
    assert engine.submitted[-1].params.stop == ["END"]


async def test_a_call_with_any_number(client, engine):
    engine.answer = [CALL.replace('"Paris"', "1" + "0" * 30)]
    response = await client.post(URL, json={"messages": HI, "max_tokens": 50, "tools": [TOOL]})
    assert response.json()["content"][0]["input"] == {"city": 10**30}


async def test_a_call_that_is_cut_off_arrives_as_far_as_it_went(client, engine):
    begun = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "wh'
    engine.finish_reason = "length"
    for cut, arguments in ((-7, {}), (None, {"city": "Paris"})):
        engine.answer = [begun[:cut]]
        found = await create(client, tools=[TOOL])
        assert found.stop_reason == "max_tokens"
        assert blocks(found.content) == [("weather", arguments)]


# --- input ----------------------------------------------------------------------------------------


async def test_blocks_become_messages(client, engine):
    await create(
        client,
        system=[{"type": "text", "text": "Kind.", "cache_control": {"type": "ephemeral"}}],
        tools=[TOOL],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Ok"},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "c2"},
                {"type": "text", "text": "And now?"},
            ]},
        ],
    )  # fmt: skip
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    template = engine.model.chat_template
    assert template.messages == [
        {"role": "system", "content": "Kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "reasoning_content": "Hm", "content": "Ok",
         "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert template.tools == [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
    ]  # fmt: skip


async def test_an_assistants_last_text_is_gone_on_with(client, engine):
    await create(client, messages=[*HI, {"role": "assistant", "content": "Roses are"}])
    text = engine.model.tokenizer.decode(engine.submitted[0].prompt)
    assert text == "user: hi\nassistant: Roses are\n"


async def test_tool_choice(client, engine):
    engine.answer = [CALL]

    async def params(choice):
        await create(client, tools=[TOOL], tool_choice=choice)
        return engine.submitted[-1].params

    assert (await params({"type": "auto"})).structured_outputs is None
    assert (await params({"type": "none"})).structured_outputs is None
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        assert (await params(choice)).structured_outputs.structural_tag
    engine.answer = [CALL, "\n", CALL]
    alone = {"type": "auto", "disable_parallel_tool_use": True}
    assert len((await create(client, tools=[TOOL], tool_choice=alone)).content) == 1
    assert len((await create(client, tools=[TOOL])).content) == 2


async def test_thinking(client, engine, monkeypatch):
    monkeypatch.setattr(engine.checks, "process", lambda *_, **__: None)
    engine.answer = ["<think>", "Hm", "</think>", "Yes"]
    await create(client, thinking={"type": "enabled", "budget_tokens": 7})
    assert engine.submitted[-1].params.thinking_token_budget == 7
    assert engine.model.chat_template.calls[-1]["enable_thinking"] is True
    hidden = await create(client, thinking={"type": "adaptive", "display": "omitted"})
    assert blocks(hidden.content) == [("text", "Yes")]
    await create(client, thinking={"type": "disabled"})
    assert engine.model.chat_template.calls[-1]["enable_thinking"] is False
    engine.model.chat_template.source = "plain"
    found = await create(client, thinking={"type": "enabled", "budget_tokens": 7})
    assert found.model_extra["warnings"] == ["field thinking has no effect on this model"]
    assert engine.submitted[-1].params.thinking_token_budget is None


async def test_output_config(client, engine):
    form = {"type": "json_schema", "schema": SCHEMA}
    await create(client, output_config={"effort": "low", "format": form})
    assert engine.submitted[0].params.structured_outputs.json == SCHEMA
    assert engine.model.chat_template.calls[0]["reasoning_effort"] == "low"


async def test_counting(sdk, client, engine):
    found = await sdk.messages.count_tokens(
        model="tiny", messages=HI, system="Be kind.", tools=[TOOL]
    )
    await create(client, system="Be kind.", tools=[TOOL])
    assert found.input_tokens == len(engine.submitted[0].prompt)
    response = await client.post(f"{URL}/count_tokens", json={"messages": HI})
    MessageTokensCount.model_validate_json(response.content, strict=True)


# --- what is refused, and what is warned of -------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "body"),
    [
        ("max_tokens", {"max_tokens": None}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 10**6}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "villain", "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["a"]}]}),
        ("content[0].content[0]", {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}]}]}),
        ("messages[0].content[0].input", {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "f", "input": "x"}]}]}),
        ("temperature", {"temperature": 3}),
        ("stop_sequences", {"stop_sequences": [""]}),
        ("tools[0].type", {"tools": [{"type": 5, "name": "bash"}]}),
        ("thinking.type", {"thinking": {"type": "deep"}}),
        ("tools[0].input_schema", {"tools": [{"name": "f"}]}),
        ("tool_choice", {"tool_choice": {"type": "any"}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "some"}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}),
        ("output_config.format", {"output_config": {"format": {"type": "json_schema"}}}),
        ("mcp_servers", {"mcp_servers": [{"url": "x"}]}),
    ],
)  # fmt: skip
async def test_refused(client, named, body):
    assert named in await refused(client, "invalid_request_error", **body)


async def test_other_errors(client, make_client, engine):
    await refused(client, "not_found_error", 404, model="nope")
    keyed = make_client(api_keys=["k"])
    await refused(keyed, "authentication_error", 401)
    await refused(keyed, "authentication_error", 401, headers={"x-api-key": "wrong"})
    for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
        assert (
            await keyed.post(URL, json={"messages": HI, "max_tokens": 5}, headers=headers)
        ).is_success
    for one, other in (("k", "x"), ("x", "k")):
        both = {"x-api-key": one, "authorization": f"Bearer {other}"}
        assert (await keyed.get("/v1/models", headers=both)).is_success
    assert (await keyed.get("/v1/models", headers={"authorization": "Basic k"})).status_code == 401
    small = make_client(max_body_bytes=20)
    body = (await small.post(URL, json={"messages": HI})).json()
    assert (body["type"], body["error"]["type"]) == ("error", "request_too_large")
    loading = make_client(loaded=False)
    await refused(loading, "overloaded_error", 503)
    body = (await client.get(URL)).json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert (await client.get(f"{URL}/x")).json()["error"]["type"] == "not_found_error"
    assert "param" in (await client.post("/v1/messages2", json={})).json()["error"]  # OpenAI's
    engine.refuse = queue_full()
    await refused(client, "rate_limit_error", 429)
    engine.refuse = RuntimeError("secret")
    assert "secret" not in await refused(client, "api_error", 500)


async def test_a_failure_in_a_stream(sdk, client, engine):
    engine.fail_at = 2
    found = await events(client)
    assert found[-1]["type"] == "error" and found[-1]["error"]["type"] == "api_error"
    with pytest.raises(anthropic.APIStatusError):
        async with sdk.messages.stream(model="tiny", max_tokens=9, messages=HI) as stream:
            await stream.get_final_message()


async def test_warnings_and_strictness(client, make_client):
    body = {
        "foo": 1,
        "cache_control": {"type": "ephemeral"},
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
    }
    found = await create(client, **body)
    assert found.model_extra["warnings"] == ["unknown field foo was ignored"]
    strict = make_client(strict_requests=True)
    assert "foo" in await refused(strict, "invalid_request_error", **body)
    del body["foo"]
    await create(strict, **body)


def test_every_field_of_the_client_is_known():
    from anthropic.types.message_create_params import MessageCreateParamsNonStreaming

    warned = {"diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id"}
    theirs = set(MessageCreateParamsNonStreaming.__annotations__) - warned
    ours = set(MessagesRequest.model_fields) | set(unsupported.MESSAGES) | unsupported.NO_EFFECT
    assert theirs <= ours, theirs - ours

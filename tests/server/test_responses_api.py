"""/v1/responses: asked by the `openai` client, whose types are checked strictly; the engine scripted."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace

import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted_engine import queue_full

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.server import unsupported
from quire.server.dialect_schemas import ResponsesRequest
from quire.server.errors import ApiError
from quire.server.response_store import ResponseStore, StoredResponse

URL = "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "d",
    "parameters": SCHEMA,
    "strict": None,
}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
MIXED = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"
EVENT = TypeAdapter(ResponseStreamEvent)
OURS = {"warnings"}


@pytest.fixture
def engine(engine):
    engine.model.max_model_len = 4096
    engine.model.chat_template.source = "<tool_call> ... </think>"
    return engine


@pytest.fixture
async def sdk(client):
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=client, max_retries=0
    ) as found:
        yield found


def nothing_unknown(model: BaseModel) -> None:
    """The client itself takes nearly anything."""
    assert set(model.model_extra or {}) <= OURS, model.model_extra
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                nothing_unknown(item)


async def create(client, **body) -> Response:
    response = await client.post(URL, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    found = Response.model_validate_json(response.content, strict=True)
    nothing_unknown(found)
    return found


async def events(client, **body) -> list:
    """Every event of a stream, validated strictly, numbered in order."""
    response = await client.post(URL, json={"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n")[:-1]:
        if block:
            name, data = block.split("\n")
            found.append(EVENT.validate_json(data.removeprefix("data: "), strict=True))
            assert name == f"event: {found[-1].type}"
            nothing_unknown(found[-1])
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


async def refused(client, param: str | None, status: int = 400, **body) -> str:
    response = await client.post(URL, json={"input": "hi", **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, status)
    return error["message"]


def said(response: Response) -> list:
    """What an answer says, without ids."""
    out = []
    for item in response.output:
        if item.type == "function_call":
            out.append(("call", item.name, item.arguments, item.status))
        else:
            out.append((item.type, "".join(part.text for part in item.content), item.status))
    return out


# --- shapes ---------------------------------------------------------------------------------------


async def test_an_answer(client, engine):
    found = await create(
        client, instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=9, temperature=0.5
    )
    assert found.id.startswith("resp_") and found.output_text == "Hello there, world!"
    assert (found.status, found.error, found.incomplete_details) == ("completed", None, None)
    assert said(found) == [("message", "Hello there, world!", "completed")]
    assert (found.instructions, found.metadata) == ("Be kind.", {"a": "b"})
    assert (found.temperature, found.top_p, found.max_output_tokens) == (0.5, 1.0, 9)
    usage, prompt = found.usage, len(engine.submitted[0].prompt)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (prompt, 5, prompt + 5)
    assert usage.input_tokens_details.cached_tokens == 2
    text = engine.model.tokenizer.decode(engine.submitted[0].prompt)
    assert text == "system: Be kind.\nuser: hi\nassistant:"
    assert engine.submitted[0].params.max_tokens == 9


async def test_the_events_of_a_text(client):
    found = await events(client)
    words = ["Hello", " there", ",", " world", "!"]
    assert [event.type.removeprefix("response.") for event in found] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * 5,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert found[0].response.status == "in_progress" and found[0].response.output == []
    assert found[2].item.content == [] and found[2].item.status == "in_progress"
    assert found[3].part.text == ""
    assert [event.delta for event in found[4:9]] == words
    assert found[9].text == found[10].part.text == found[11].item.content[0].text == "".join(words)
    assert found[12].response.output == [found[11].item]


async def test_the_events_of_reasoning_and_a_call(client, engine):
    engine.answer = [MIXED[i : i + 3] for i in range(0, len(MIXED), 3)]
    found = await events(client, tools=[TOOL])
    kinds = [event.type.removeprefix("response.") for event in found]
    once = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    assert once == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    calls = [e for e in found if "function_call_arguments" in e.type]
    assert "".join(e.delta for e in calls[:-1]) == calls[-1].arguments == PARIS
    done = [e for e in found if e.type == "response.output_item.done"]
    assert [e.output_index for e in done] == [0, 1, 2]
    assert {e.item_id for e in calls} == {done[2].item.id}
    whole = await create(client, tools=[TOOL])
    assert said(whole) == said(found[-1].response) == [
        ("reasoning", "Hm.", "completed"),
        ("message", "Let me see.", "completed"),
        ("call", "weather", PARIS, "completed"),
    ]  # fmt: skip
    assert whole.usage == found[-1].response.usage
    assert whole.output[2].call_id.startswith("call_")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_cut_off_is_incomplete(client, engine, stream):
    engine.finish_reason = "length"
    engine.answer = ["Well, ", CALL[:52]]
    if stream:
        found = await events(client, tools=[TOOL])
        assert found[-1].type == "response.incomplete"
        found = found[-1].response
    else:
        found = await create(client, tools=[TOOL])
    assert found.status == "incomplete" and found.completed_at is None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in found.output] == ["completed", "incomplete"]
    await create(client, previous_response_id=found.id, tools=[TOOL])
    [call] = rendered(engine)[1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city"'}


async def test_logprobs(client, engine):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = (await create(client, **asked)).output[0].content[0].logprobs
    assert [entry.token for entry in whole] == ["Hello", " there", ",", " world", "!"]
    assert bytes(whole[0].bytes) == b"Hello" and whole[0].top_logprobs[0].token == "<eos>"
    found = await events(client, **asked)
    deltas = [e for e in found if e.type == "response.output_text.delta"]
    assert [e.logprobs[0].token for e in deltas] == [entry.token for entry in whole]
    assert found[-1].response.output[0].content[0].logprobs == whole
    plain = await create(client)
    assert plain.output[0].content[0].logprobs == []
    engine.answer = ["See: ", CALL, " Done", "."]
    for found in (
        await create(client, tools=[TOOL], **asked),
        (await events(client, tools=[TOOL], **asked))[-1].response,
    ):
        told = [i.content[0].logprobs for i in found.output if i.type == "message"]
        assert len(told) == 2 and sum(map(len, told)) == 4


async def test_the_clients_own_stream_and_parse(sdk, engine):
    class Where(BaseModel):
        city: str

    engine.answer = ['{"city"', ': "Paris"}']
    parsed = await sdk.responses.parse(model="tiny", input="hi", text_format=Where)
    assert parsed.output_parsed == Where(city="Paris")
    grammar = engine.submitted[0].params.structured_outputs
    assert grammar.json["properties"]["city"]["type"] == "string"
    async with sdk.responses.stream(model="tiny", input="hi", text_format=Where) as stream:
        seen = [event async for event in stream]
        assert (await stream.get_final_response()).output_parsed == Where(city="Paris")
    assert [e.snapshot for e in seen if e.type == "response.output_text.delta"] == [
        '{"city"', '{"city": "Paris"}',
    ]  # fmt: skip


# --- input ----------------------------------------------------------------------------------------


def rendered(engine) -> list[dict]:
    return engine.model.chat_template.messages


@pytest.fixture(autouse=True)
def messages_kept(engine, monkeypatch):
    template = engine.model.chat_template
    render = template.render

    def keep(messages, **kwargs):
        template.messages = [dict(message) for message in messages]
        return render(messages, **kwargs)

    monkeypatch.setattr(template, "render", keep)


async def test_items_become_messages(client, engine):
    items = [
        {"role": "developer", "content": "Short."},
        {"role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Ok", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": PARIS, "id": None},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "assistant", "content": "One."},
        {"type": "message", "role": "assistant", "content": "Two."},
    ]  # fmt: skip
    await create(client, input=items, instructions="Kind.", tools=[TOOL])

    def call(number: int, arguments: str) -> dict:
        function = {"name": "weather", "arguments": arguments}
        return {"id": f"c{number}", "type": "function", "function": function}

    assert rendered(engine) == [
        {"role": "system", "content": "Kind.\n\nShort."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Ok", "reasoning_content": "Hm",
         "tool_calls": [call(1, PARIS), call(2, "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ]  # fmt: skip


async def test_developers_are_heard_where_templates_know_them(client, engine):
    items = [{"role": "developer", "content": "Short."}]
    engine.model.chat_template.source = "{% if role == 'developer' %}"
    await create(client, input=items)
    assert rendered(engine) == items


async def test_tools_are_chat_completions_tools(client, engine):
    engine.answer = [CALL]
    named = await create(client, tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
    assert named.tool_choice.name == "weather" and named.tools[0].name == "weather"
    assert engine.submitted[0].params.structured_outputs.structural_tag
    alone = await create(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert not alone.parallel_tool_calls and len(alone.output) == 1


async def test_truncation_leaves_out_the_oldest_turns(client, engine):
    engine.model.max_model_len = 40
    long = [
        {"role": role, "content": f"{number} " * 8}
        for number in range(6)
        for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Kind."}, *long, {"role": "user", "content": "now"}]
    await refused(client, "input_tokens", input=items)
    found = await create(client, input=items, truncation="auto", max_output_tokens=2)
    assert found.truncation == "auto"
    kept = rendered(engine)
    assert kept[0]["role"] == "system" and kept[-1]["content"] == "now"
    assert 2 < len(kept) < len(items) and kept[1]["role"] == "user"
    assert kept[1:] == items[-len(kept) + 1 :]
    await create(client, input=items[-3:], truncation="auto")
    assert rendered(engine) == items[-3:]


async def test_counting(sdk, engine):
    found = await sdk.responses.input_tokens.count(model="tiny", input="how are you")
    await sdk.responses.create(model="tiny", input="how are you")
    assert found.input_tokens == len(engine.submitted[0].prompt)
    assert found.object == "response.input_tokens"


# --- what is refused, and what is warned of -------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("body.input", {"input": None}),
        ("body.input", {"input": 5}),
        ("body.input", {"input": []}),
        ("body.input", {"input": [{"role": "villain", "content": "a"}]}),
        ("body.input", {"input": [{"role": "user"}]}),
        ("body.input", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
        ("body.input", {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}),
        ("body.input", {"input": [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]}),
        ("input", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("body.input", {"input": [{"type": "item_reference"}]}),
        ("input", {"input": [{"type": "telepathy", "id": "a"}]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_output_tokens", {"max_output_tokens": 10**6}),
        ("temperature", {"temperature": 3}),
        ("body.temperature", {"temperature": "hot"}),
        ("body.top_logprobs", {"top_logprobs": 21}),
        ("body.tools", {"tools": [{"name": "f"}]}),
        ("body.tools", {"tools": [{"type": "custom"}]}),
        ("body.tools", {"tools": [{"type": "namespace", "name": "n", "tools": ["f"]}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("body.text.format", {"text": {"format": 5}}),
        ("text.format", {"text": {"format": {"type": "xml"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("structured_outputs", {"structured_outputs": {"regex": "("}}),
        ("top_logprobs", {"top_logprobs": 20}),
        ("conversation", {"conversation": "c"}),
        ("max_tokens", {"max_tokens": 5}),
        ("n", {"n": 2}),
        ("body.metadata.a", {"metadata": {"a": 1}}),
        ("background", {"background": True, "stream": True}),
        ("store", {"background": True, "store": False}),
    ],
)  # fmt: skip
async def test_refused(client, param, body):
    message = await refused(client, param, **body)
    assert "messages" not in message or "max_tokens" in body


async def test_other_errors(client, engine):
    await refused(client, "model", 404, model="nope")
    await refused(client, "previous_response_id", 404, previous_response_id="resp_x")
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"),
    ):  # fmt: skip
        response = await client.request(method, f"{URL}/resp_x{path}")
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "response_id"
    engine.refuse = queue_full()
    response = await client.post(URL, json={"input": "hi"})
    assert response.status_code == 429 and response.headers["retry-after"] == "3"


async def test_warnings_and_strictness(client, make_client):
    body = {
        "foo": 1, "text": {"verbosity": "low"}, "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "user": "u", "prompt_cache_key": "k",
    }  # fmt: skip
    found = await create(client, **body)
    assert [warning.split()[2] for warning in found.model_extra["warnings"]] == [
        "foo", "text.verbosity", "reasoning.summary", "include.reasoning.encrypted_content",
    ]  # fmt: skip
    strict = make_client(strict_requests=True)
    await refused(strict, "text.verbosity", text={"verbosity": "low"})
    await create(strict, user="u", reasoning={"effort": "low", "summary": None})


def test_every_field_of_the_client_is_known():
    from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

    warned = {"access_programs", "image", "max_tool_calls"}
    theirs = set(ResponseCreateParamsNonStreaming.__annotations__) - warned
    ours = set(ResponsesRequest.model_fields) | set(unsupported.RESPONSES) | unsupported.NO_EFFECT
    assert theirs <= ours, theirs - ours


# --- what is kept ---------------------------------------------------------------------------------


async def test_kept_gone_on_with_listed_and_deleted(sdk, engine):
    first = await sdk.responses.create(model="tiny", input="one", instructions="Kind.")
    assert await sdk.responses.retrieve(first.id) == first
    second = await sdk.responses.create(
        model="tiny", input="two", previous_response_id=first.id, instructions="Short."
    )
    assert second.previous_response_id == first.id
    assert [message["content"] for message in rendered(engine)] == [
        "Short.", "one", "Hello there, world!", "two",
    ]  # fmt: skip
    raw = await sdk.responses.input_items.with_raw_response.list(second.id, order="asc")
    items = ResponseItemList.model_validate_json(raw.content, strict=True)
    nothing_unknown(items)
    assert [item.content[0].text for item in items.data] == ["one", "Hello there, world!", "two"]
    assert [item.id async for item in sdk.responses.input_items.list(second.id, limit=2)] == [
        item.id for item in reversed(items.data)
    ]
    await sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(first.id)
    unkept = await sdk.responses.create(model="tiny", input="one", store=False)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(unkept.id)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "after=x"])
async def test_wrong_pages(client, query):
    found = await create(client)
    response = await client.get(f"{URL}/{found.id}/input_items?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]
    response = await client.get(f"{URL}/{found.id}?stream=true")
    assert response.json()["error"]["param"] == "stream"


async def test_another_keys_response_is_unknown(make_client):
    client = make_client(api_keys=["a", "b"])
    a, b = {"authorization": "Bearer a"}, {"x-api-key": "b"}
    kept = (await client.post(URL, json={"input": "hi"}, headers=a)).json()["id"]
    assert (await client.get(f"{URL}/{kept}", headers=a)).status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        response = await client.request(method, f"{URL}/{kept}{path}", headers=b)
        assert response.status_code == 404
    body = {"input": "hi", "previous_response_id": kept}
    assert (await client.post(URL, json=body, headers=b)).status_code == 404
    assert (await client.post(URL, json=body, headers={"x-api-key": "a"})).status_code == 200


def stored(name: str, size: int = 10, status: str = "completed") -> StoredResponse:
    return StoredResponse(name, None, [{"t": "x" * size}], {"status": status, "output": []})


def kept(store: ResponseStore, *names: str) -> list[str]:
    found = []
    for name in names:
        with suppress(ApiError):
            found.append(store.get(name, None, param="p").id)
    return found


def test_the_store_is_bounded():
    store = ResponseStore(2, 10_000)
    for name in "abc":
        store.add(stored(name))
    assert kept(store, *"abc") == ["b", "c"]
    store = ResponseStore(10, 1000)
    for name in "abc":
        store.add(stored(name, 400))
    assert kept(store, *"abc") == ["b", "c"]
    store.update("c", {"status": "completed", "output": ["y" * 400]})
    assert kept(store, *"bc") == ["c"]
    store.add(stored("d", 2000))
    assert len(store) == 0
    store.add(stored("e", 400))
    store.remove("e")
    store.add(stored("f", 800))
    assert kept(store, "f") == ["f"]
    store.update("f", {"status": "cancelled", "output": []})
    store.update("f", {"status": "completed", "output": ["late"]})
    found = store.get("f", None, param="p").response
    assert (found["status"], found["output"]) == ("cancelled", ["late"])
    nothing = ResponseStore(0, 1000)
    nothing.add(stored("a"))
    assert len(nothing) == 0
    with pytest.raises(ConfigError, match="max_stored_responses"):
        replace(ServerConfig(), max_stored_responses=-1)


# --- ends -----------------------------------------------------------------------------------------


async def test_background_and_cancel(sdk, engine):
    engine.hold()
    queued = await sdk.responses.create(model="tiny", input="hi", background=True)
    assert queued.status == "queued" and queued.background
    assert (await sdk.responses.retrieve(queued.id)).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="in progress"):
        await sdk.responses.create(model="tiny", input="hi", previous_response_id=queued.id)
    assert (await sdk.responses.cancel(queued.id)).status == "cancelled"
    assert engine.streams[0].aborts == 1
    engine.release()
    other = await sdk.responses.create(model="tiny", input="hi", background=True)
    async with asyncio.timeout(5):
        while (found := await sdk.responses.retrieve(other.id)).status == "in_progress":
            await asyncio.sleep(0)
    assert found.status == "completed" and found.output_text == "Hello there, world!"
    assert (await sdk.responses.cancel(other.id)).status == "completed"
    assert (await sdk.responses.retrieve(queued.id)).status == "cancelled"
    engine.fail_at = 0
    failing = await sdk.responses.create(model="tiny", input="hi", background=True)
    async with asyncio.timeout(5):
        while (found := await sdk.responses.retrieve(failing.id)).status == "in_progress":
            await asyncio.sleep(0)
    assert found.status == "failed" and found.error.code == "server_error"
    assert "secret" not in found.error.message


async def test_a_stream_is_cancelled(client, engine):
    engine.hold()
    asking = asyncio.ensure_future(events(client))
    async with asyncio.timeout(5):
        while not engine.streams:
            await asyncio.sleep(0)
    name = engine.submitted[0].request_id
    assert (await client.post(f"{URL}/{name}/cancel")).json()["status"] == "cancelled"
    engine.release()
    assert (await asking)[-1].response.status == "cancelled"


async def test_a_failure_in_a_stream(client, engine):
    engine.fail_at = 2
    found = await events(client)
    assert [e.type for e in found[-2:]] == ["response.output_item.done", "response.failed"]
    response = found[-1].response
    assert response.status == "failed" and response.error.code == "server_error"
    assert said(response) == [("message", "Hello there", "incomplete")]
    assert "secret" not in json.dumps(response.model_dump())
    again = (await client.get(f"{URL}/{response.id}")).json()
    assert again["status"] == "failed" and again["error"] == response.error.model_dump(
        exclude_unset=True
    )

"""/v1/responses and /v1/messages over a socket: who hangs up ends the work; and the clients, on the built-in
model, get what chat completions gives them."""

from __future__ import annotations

import json

import anthropic
import httpx
import openai
import pytest
from test_live import running

QUESTION = "What does os.path.join do?"
MODEL = "quire-builtin"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["a"],
    "additionalProperties": False,
}
BODIES = {
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("streamed", [False, True])
async def test_who_leaves_ends_the_work(path, streamed):
    async with running() as server:
        server.engine.hold()
        body = BODIES[path] | {"stream": streamed}
        with pytest.raises(httpx.ReadTimeout):
            await server.client.post(path, json=body, timeout=httpx.Timeout(5, read=0.3))
        await server.until(lambda: [s.aborts for s in server.engine.streams] == [1])
        if path == "/v1/responses":
            url = f"{path}/{server.engine.submitted[0].request_id}"
            assert (await server.client.get(url)).json()["status"] == "cancelled"


async def test_a_background_response_outlives_its_client_but_not_the_server():
    async with running(shutdown_timeout=0.0) as server:
        server.engine.hold()
        body = BODIES["/v1/responses"] | {"background": True}
        assert (await server.client.post("/v1/responses", json=body)).json()["status"] == "queued"
        await server.client.get("/ready")
        assert not server.engine.streams[0].ended
        server.stop.hit()
        await server.until(lambda: server.task.done())
        assert server.engine.streams[0].ended


@pytest.fixture(scope="module")
def sdk(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(demo_server):
    with anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as client:
        yield client


def test_three_dialects_say_the_same(sdk, claude):
    messages = [{"role": "user", "content": QUESTION}]
    chat = sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    expected, usage = chat.choices[0].message.content, chat.usage
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    response = sdk.responses.create(**body)
    assert response.output_text == expected and response.status == "incomplete"
    assert response.usage.input_tokens == usage.prompt_tokens
    events = list(sdk.responses.create(**body, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    assert events[-1].response.usage.output_tokens == 24
    body = {
        "model": MODEL,
        "messages": messages,
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
    }
    message = claude.messages.create(**body)
    assert (message.content[0].text, message.stop_reason) == (expected, "max_tokens")
    with claude.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == expected
    counted = claude.messages.count_tokens(model=MODEL, messages=messages)
    assert counted.input_tokens == usage.prompt_tokens


def test_forced_calls(sdk, claude):
    response = sdk.responses.create(
        model=MODEL, input=QUESTION, tool_choice="required", temperature=0,
        tools=[{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
    )  # fmt: skip
    [call] = [item for item in response.output if item.type == "function_call"][:1]
    assert call.name == "f" and 0 <= json.loads(call.arguments)["a"] <= 999
    said = [
        *response.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "7"},
    ]
    assert sdk.responses.create(model=MODEL, input=said, max_output_tokens=4).output
    message = claude.messages.create(
        model=MODEL, max_tokens=100, messages=[{"role": "user", "content": QUESTION}],
        tools=[{"name": "f", "input_schema": SCHEMA}], tool_choice={"type": "tool", "name": "f"},
    )  # fmt: skip
    [block] = message.content
    assert message.stop_reason == "tool_use" and block.input == {"a": block.input["a"]}


def test_a_format_is_kept(sdk):
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    response = sdk.responses.create(model=MODEL, input=QUESTION, text={"format": form})
    assert json.loads(response.output_text).keys() == {"a"}
    with pytest.raises(openai.BadRequestError) as caught:
        bad = form | {"schema": {"type": "object", "properties": {"a": {"pattern": "("}}}}
        sdk.responses.create(model=MODEL, input=QUESTION, text={"format": bad})
    assert caught.value.param == "text.format"

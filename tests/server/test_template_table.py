"""Every shape of conversation with every behaviour of a template, over HTTP and in each dialect.

The prompt is the one that `ChatTemplate.render` makes of the same messages: what it must be is tested in
`tests/text/test_template_facts.py`. Here the front ends are, which must hand over all that a client said.
"""

from __future__ import annotations

import copy
import json

import pytest
from tests.text import conversations as c
from tests.text.published import BY_NAME
from tests.text.test_template_facts import NO_NOTATION, TEMPLATES

from quire.text import ChatTemplate

SAYABLE = [name for name in c.SHAPES if name not in ("no ids", "object", "arguments None")]
"""Those that /v1/responses can say."""


class Spy:
    """A template whose prompts a test can read."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.source = template.source
        self.prompts: list[str] = []

    def render(self, messages, **options):
        self.prompts.append(self._template.render(messages, **options))
        return self.prompts[-1]


@pytest.fixture(params=BY_NAME)
def template(request, engine) -> Spy:
    engine.model.chat_template = spy = Spy(TEMPLATES[request.param])
    spy.name = request.param
    return spy


async def prompt_of(client, template: Spy, url: str, body: dict) -> str:
    response = await client.post(url, json=body)
    assert response.status_code == 200, (body, response.text)
    return template.prompts[-1]


def check(template: Spy, shape: c.Shape, prompt: str) -> None:
    lost = [word for word in shape.words if word not in prompt]
    assert not lost or (template.name in NO_NOTATION and shape.has_calls), (shape, prompt)


async def test_chat_completions(client, template) -> None:
    for name, shape in c.SHAPES.items():
        expected = TEMPLATES[template.name].render(copy.deepcopy(list(shape.messages)))
        body = {"messages": shape.messages}
        assert await prompt_of(client, template, "/tokenize", body) == expected, name


async def test_responses(client, template) -> None:
    for name in SAYABLE:
        shape = c.SHAPES[name]
        items = [item for message in shape.messages for item in as_items(message)]
        body = {"input": items}
        check(
            template, shape, await prompt_of(client, template, "/v1/responses/input_tokens", body)
        )


async def test_messages(client, template) -> None:
    for name, shape in c.SHAPES.items():
        if name.startswith("arguments ") or name == "no ids" or _has_developer(shape):
            continue  # there arguments are objects, ids are required, and there is no such role
        body = {"model": "tiny", "messages": [as_blocks(message) for message in shape.messages]}
        if shape.messages[0]["role"] == "system":
            body["system"] = body["messages"].pop(0)["content"]
        url = "/v1/messages/count_tokens"
        check(template, shape, await prompt_of(client, template, url, body))


CALL = {"type": "tool_use", "id": c.ID, "name": "quirefunction", "input": c.OBJECT}
RESULT = {"type": "tool_result", "tool_use_id": c.ID, "content": "quireresult"}


@pytest.mark.parametrize("text", ["quireanswer", ""])
async def test_text_after_a_call(client, template, text) -> None:
    """Anthropic's blocks, and the items of Responses, come in any order."""
    words = ["quireuser", "quirefunction", "quirevalue", "quireresult"]
    shape = c.Shape([c.user(" ".join(words)), c.result()], frozenset({"quireanswer"}))
    said = {"type": "text", "text": text}
    messages = [
        c.user(),
        {"role": "assistant", "content": [CALL, said]},
        {"role": "user", "content": [RESULT]},
    ]
    body = {"model": "tiny", "messages": messages}
    prompt = await prompt_of(client, template, "/v1/messages/count_tokens", body)
    check(template, shape, prompt)
    called = {
        "type": "function_call",
        "call_id": c.ID,
        "name": "quirefunction",
        "arguments": c.TEXT,
    }
    items = [
        c.user(), called, {"type": "message", "role": "assistant", "content": text},
        {"type": "function_call_output", "call_id": c.ID, "output": "quireresult"},
    ]  # fmt: skip
    body = {"input": items}
    assert await prompt_of(client, template, "/v1/responses/input_tokens", body) == prompt


def _has_developer(shape: c.Shape) -> bool:
    return any(message["role"] == "developer" for message in shape.messages)


def _texts(content: object) -> list[str]:
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [] if content is None else [str(content)]


def as_items(message: c.Message) -> list[dict]:
    role, content = message["role"], message.get("content")
    if role == "tool":
        said = content
        if isinstance(content, list):
            said = [{"type": "input_text", "text": text} for text in _texts(content)]
        return [
            {"type": "function_call_output", "call_id": message["tool_call_id"], "output": said}
        ]
    kind = "output_text" if role == "assistant" else "input_text"
    items: list[dict] = []
    if "reasoning_content" in message:
        thought = {"type": "reasoning_text", "text": message["reasoning_content"]}
        items.append({"type": "reasoning", "id": "rs_1", "summary": [], "content": [thought]})
    if _texts(content):
        parts = [{"type": kind, "text": text} for text in _texts(content)]
        items.append({"type": "message", "role": role, "content": parts})
    for call in message.get("tool_calls") or []:
        function = call["function"]
        items.append({"type": "function_call", "call_id": call["id"], **function})
    return items


def as_blocks(message: c.Message) -> dict:
    role, content = message["role"], message.get("content")
    texts = [{"type": "text", "text": text} for text in _texts(content)]
    if role == "tool":
        result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": texts}
        return {"role": "user", "content": [result]}
    blocks = texts if "reasoning_content" not in message else [
        {"type": "thinking", "thinking": message["reasoning_content"], "signature": ""}, *texts,
    ]  # fmt: skip
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": given}
        )
    return {"role": role, "content": blocks}

"""Conversations of several turns, in the shapes of several clients, on the built-in model and on a tiny
checkpoint. What the server answered may be sent back as it was, and every shape makes the same prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest
from tests.engine.checkpoints import write_checkpoint

from quire.cli.demo.server import ServerProcess

pytestmark = pytest.mark.timeout(240)

QUESTION = "What does os.path.join do?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ROOM = 150
"""Tokens, for a call that is forced; a token of the checkpoint is a byte or two."""
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def checkpoint_server(tmp_path_factory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint("qwen3", directory, max_position_embeddings=2048)
    config = {"model": str(directory), "tool_call_parser": "hermes"}
    server = ServerProcess.start(config, tmp_path_factory.mktemp("server"))
    try:
        asyncio.run(server.wait_ready())
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", params=["builtin", "checkpoint"])
def url(request) -> str:
    fixture = "demo_server" if request.param == "builtin" else "checkpoint_server"
    return request.getfixturevalue(fixture).url


@pytest.fixture(scope="module")
def http(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def ask(http: httpx.Client, path: str, **body) -> dict:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


# --- the openai client ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_of_chat_completions(sdk, stream):
    """The message goes back as the client's own object, or as put together from chunks."""
    messages: list = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    for choice in ("required", "required", "none"):
        body = {
            "model": "", "messages": messages, "tools": [TOOL], "tool_choice": choice,
            "parallel_tool_calls": False, "max_completion_tokens": ROOM, "temperature": 0,
        }  # fmt: skip
        if stream and choice == "required":  # the client's stream raises where an answer is cut
            with sdk.chat.completions.stream(**body) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = sdk.chat.completions.create(**body).choices[0].message
        messages.append(message if not stream else message.model_dump())
        calls = message.tool_calls or []
        assert bool(calls) == (choice == "required")
        for call in calls:
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stored", [True, False])
def test_a_tool_loop_of_responses(sdk, stored, stream):
    """By previous_response_id, or with everything sent back."""
    tool = {"type": "function", "strict": None, **FUNCTION}
    items: list = [{"role": "user", "content": QUESTION}]
    previous, prompts = None, []
    for choice in ("required", "required", "none"):
        body = {
            "model": "", "input": items, "tools": [tool], "tool_choice": choice, "store": stored,
            "parallel_tool_calls": False, "max_output_tokens": ROOM, "temperature": 0,
            "instructions": "Be brief.", "include": [], "previous_response_id": previous,
        }  # fmt: skip
        if stream:
            [response] = [
                event.response
                for event in sdk.responses.create(**body, stream=True)
                if event.type in ("response.completed", "response.incomplete")
            ]
        else:
            response = sdk.responses.create(**body)
        prompts.append(response.usage.input_tokens)
        calls = [item for item in response.output if item.type == "function_call"]
        assert bool(calls) == (choice == "required")
        outputs = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
            for call in calls
        ]
        items = outputs if stored else [*items, *response.output, *outputs]
        previous = response.id if stored else None
    assert prompts == sorted(set(prompts)), "each prompt has all before it"


def test_stored_and_sent_back_make_the_same_prompt(sdk):
    first = sdk.responses.create(model="", input=QUESTION, max_output_tokens=9, temperature=0)
    follow = {"role": "user", "content": "And then?"}
    stored = sdk.responses.create(
        model="", input=[follow], previous_response_id=first.id, max_output_tokens=9, temperature=0
    )
    items = [{"role": "user", "content": QUESTION}, *first.output, follow]
    sent = sdk.responses.create(model="", input=items, max_output_tokens=9, temperature=0)
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    referred = sdk.responses.create(
        model="", input=[items[0], *references, follow], max_output_tokens=9, temperature=0
    )
    for other in (sent, referred):
        assert other.usage.input_tokens == stored.usage.input_tokens
        assert other.output_text == stored.output_text


# --- the anthropic client -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_of_messages(claude, stream):
    tool = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
    messages: list = [{"role": "user", "content": QUESTION}]
    for choice in ("any", "any", "none"):
        body = {
            "model": "", "max_tokens": ROOM, "system": [{"type": "text", "text": "Be brief."}],
            "messages": messages, "tools": [tool], "extra_body": {"temperature": 0},
            "tool_choice": {"type": choice, "disable_parallel_tool_use": True} if choice == "any"
            else {"type": choice},
        }  # fmt: skip
        if stream:
            with claude.messages.stream(**body) as events:
                message = events.get_final_message()
        else:
            message = claude.messages.create(**body)
        messages.append({"role": "assistant", "content": message.content})
        uses = [block for block in message.content if block.type == "tool_use"]
        assert bool(uses) == (choice == "any")
        if uses:
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses
            ]
            messages.append({"role": "user", "content": results})
    counted = claude.messages.count_tokens(model="", messages=messages[:1])
    assert counted.input_tokens > 0


def test_all_but_the_end_is_cached_behind_a_billing_header(claude):
    """What Claude Code sends first is another line at every request."""
    rules = {"type": "text", "text": "Answer in one sentence. Name no file. " * 20,
             "cache_control": {"type": "ephemeral"}}  # fmt: skip
    usages = []
    for cch in ("eb6c6", "71fea"):
        line = f"x-anthropic-billing-header: cc_version=2.1.100.7b4; cc_entrypoint=cli; cch={cch};"
        usages.append(
            claude.beta.messages.create(
                model="", max_tokens=4, messages=[{"role": "user", "content": QUESTION}],
                system=[{"type": "text", "text": line}, rules], betas=["claude-code-20250219"],
            ).usage
        )  # fmt: skip
    computed = [usage.input_tokens + usage.cache_creation_input_tokens for usage in usages]
    first, second = (usage.cache_read_input_tokens for usage in usages)
    assert computed[0] + first == computed[1] + second > 100
    assert computed[1] <= 16, "a block at most is computed again"


# --- other clients' shapes ------------------------------------------------------------------------

CALL = {"id": "call_1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
PLAIN = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "Thanks."},
]
LITELLM = [
    PLAIN[0],
    {
        "content": None, "role": "assistant", "function_call": None, "refusal": None, "audio": None,
        "annotations": [], "reasoning_content": None, "thinking_blocks": [], "images": None,
        "provider_specific_fields": {"refusal": None, "reasoning": None},
        "tool_calls": [{"index": 0, **CALL, "provider_specific_fields": None}],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "sunny"},
    {"content": "It is sunny.", "role": "assistant", "tool_calls": None, "function_call": None,
     "provider_specific_fields": {}, "annotations": []},
    {"role": "user", "content": [
        {"type": "text", "text": "Thanks.", "cache_control": {"type": "ephemeral"}}]},
]  # fmt: skip
LANGCHAIN = [
    PLAIN[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, PLAIN[2],
    {"role": "assistant", "content": "It is sunny.", "name": None}, PLAIN[4],
]  # fmt: skip
AI_SDK = [
    {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]}, PLAIN[2],
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": [{"type": "text", "text": "Thanks."}]},
]  # fmt: skip
AGENTS = [
    PLAIN[0], {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is sunny."}]}, PLAIN[4],
]  # fmt: skip
SHAPES = {"litellm": LITELLM, "langchain": LANGCHAIN, "ai-sdk": AI_SDK, "agents": AGENTS}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_makes_the_plain_prompt(http, name):
    plain = ask(http, "/tokenize", messages=PLAIN, tools=[TOOL])["tokens"]
    messages = SHAPES[name]
    assert ask(http, "/tokenize", messages=messages, tools=[TOOL])["tokens"] == plain
    for end in (1, 3, 5):
        body = {"messages": messages[:end], "tools": [TOOL], "max_tokens": 4}
        assert "warnings" not in ask(http, CHAT, **body, stream_options=None, functions=[], n=1)


def test_three_endpoints_make_the_same_prompt(http):
    tokens = len(ask(http, "/tokenize", messages=PLAIN, tools=[TOOL])["tokens"])
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather",
         "arguments": '{"city": "Rome"}', "id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "It is sunny.", "annotations": []}]},
        {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    found = ask(
        http, f"{RESPONSES}/input_tokens", input=items, tools=[{"type": "function", **FUNCTION}]
    )
    assert found["input_tokens"] == tokens
    blocks = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny", "is_error": False}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is sunny."}]},
        {"role": "user", "content": [{"type": "text", "text": "Thanks.", "citations": None}]},
    ]  # fmt: skip
    tool = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
    found = ask(http, f"{MESSAGES}/count_tokens", messages=blocks, tools=[tool])
    assert found["input_tokens"] == tokens


@pytest.mark.parametrize("limit", [*range(1, 16), 18, 21])
def test_an_answer_cut_anywhere_may_be_sent_back(http, limit):
    """Forced to call, and cut by max_tokens, on every endpoint."""
    question = {"role": "user", "content": QUESTION}
    body = {"messages": [question], "tools": [TOOL], "tool_choice": "required", "temperature": 0}
    message = ask(http, CHAT, **body, max_tokens=limit)["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "cut"}
        for call in message.get("tool_calls", ())
    ]
    ask(http, CHAT, **body | {"messages": [question, message, *results, question]}, max_tokens=2)

    body = {
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "required",
        "temperature": 0,
    }
    output = ask(http, RESPONSES, **body, input=QUESTION, max_output_tokens=limit)["output"]
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "cut"}
        for item in output if item["type"] == "function_call"
    ]  # fmt: skip
    ask(http, RESPONSES, **body, input=[question, *output, *outputs, question], max_output_tokens=2)

    tool = {"name": "weather", "input_schema": SCHEMA}
    body = {"tools": [tool], "tool_choice": {"type": "any"}, "temperature": 0}
    content = ask(http, MESSAGES, **body, messages=[question], max_tokens=limit)["content"]
    answer = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "cut"}
        for block in content if block["type"] == "tool_use"
    ] or "Go on."  # fmt: skip
    messages = [
        question,
        {"role": "assistant", "content": content},
        {"role": "user", "content": answer},
    ]
    ask(http, MESSAGES, **body, messages=messages, max_tokens=2)

    ask(http, CHAT, messages=[question, message], max_tokens=2)
    ask(http, RESPONSES, input=[question, *output], max_output_tokens=2)
    ask(http, MESSAGES, messages=messages[:2], max_tokens=2)


def test_a_session_of_codex(http, sdk):
    """Streamed, stateless: custom tools, namespaces, hosted tools, and what they left in the conversation."""
    tools = [
        {"type": "function", "strict": False, **FUNCTION},
        {"type": "custom", "name": "apply_patch", "description": "Edit files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}},
        {"type": "namespace", "name": "mcp__docs", "description": "Docs.",
         "tools": [{"type": "function", "name": "find", "parameters": SCHEMA}]},
        {"type": "web_search"}, {"type": "image_generation"}, {"type": "local_shell"},
    ]  # fmt: skip
    items: list = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Terse."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed",
         "action": {"type": "search", "query": "a"}},
        {"type": "local_shell_call", "call_id": "c0", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "function_call_output", "call_id": "c0", "output": "a.py"},
    ]  # fmt: skip
    choices = (
        {"type": "custom", "name": "apply_patch"},
        {"type": "function", "name": "find", "namespace": "mcp__docs"},
        "auto",
    )
    for choice in choices:
        events = sdk.responses.create(
            model="", instructions="You code.", input=items, tools=tools, tool_choice=choice,
            parallel_tool_calls=False, reasoning={"effort": "medium", "summary": "auto"}, store=False,
            stream=True, include=["reasoning.encrypted_content"], prompt_cache_key="k",
            max_output_tokens=ROOM, temperature=0, extra_body={"client_metadata": {"a": "b"}},
        )  # fmt: skip
        done = [e.item for e in events if e.type == "response.output_item.done"]
        assert done
        for item in done:
            items.append(item.model_dump(exclude_none=True))
            if item.type.endswith("_call"):
                output = {"type": f"{item.type}_output", "call_id": item.call_id, "output": "ok"}
                items.append(output)
        if choice != "auto":
            [call] = done
            assert call.type == ("function_call" if "namespace" in choice else "custom_tool_call")
            assert (call.name, call.namespace) == (choice["name"], choice.get("namespace"))
    body = {"input": items, "tools": tools}
    counted = http.post(f"{RESPONSES}/input_tokens", json=body)
    assert counted.json()["input_tokens"] > 0
    warnings = counted.headers["x-quire-warnings"].split("; ")
    assert len(warnings) == 6, warnings

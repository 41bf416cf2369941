"""Tools and reasoning in /v1/chat/completions: asked by the `openai` client, the engine scripted."""

from __future__ import annotations

import openai
import pytest
from tests.structured.mcp_tools import mcp_tools

from quire.errors import ConfigError
from quire.structured.spec import to_spec
from quire.text.parsing.formats import TOOL_FORMATS

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "weather", **fields) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


PARIS = '{"city": "Paris, the\\n one"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
THINK = ["<think>", "\n", "It ", "is ", "simple.", "\n", "</think>", "\n\n", "Yes."]
QWEN = "<tool_call> ... </think>"
MISTRAL = "[TOOL_CALLS]"


@pytest.fixture
def engine(engine):
    engine.model.max_model_len = 4096
    engine.model.chat_template.source = QWEN
    return engine


@pytest.fixture
async def sdk(client):
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=client, max_retries=0
    ) as found:
        yield found


async def ask(sdk, **body):
    return await sdk.chat.completions.create(model="tiny", **{"messages": HI, **body})


async def refused(sdk, param: str, **body) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, **body)
    assert caught.value.body["param"] == param
    return caught.value.body["message"]


async def streamed(sdk, **body) -> dict[int, dict]:
    """Each choice of a stream, put together as clients do."""
    choices: dict[int, dict] = {}
    async for chunk in await ask(sdk, stream=True, **body):
        for choice in chunk.choices:
            whole = choices.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": [], "finish": None}
            )
            assert whole["finish"] is None
            delta = choice.delta
            whole["content"] += delta.content or ""
            extra = delta.model_extra
            assert extra.get("reasoning") == extra.get("reasoning_content")
            whole["reasoning"] += extra.get("reasoning_content") or ""
            for call in delta.tool_calls or []:
                if call.index == len(whole["calls"]):
                    assert call.id and call.type == "function"
                    whole["calls"].append([call.function.name, ""])
                else:
                    assert call.id is None and call.function.name is None
                whole["calls"][call.index][1] += call.function.arguments
            whole["finish"] = choice.finish_reason
    return choices


def whole_answer(choice) -> dict:
    message = choice.message
    extra = message.model_extra
    assert extra.get("reasoning") == extra.get("reasoning_content")
    return {
        "content": message.content or "",
        "reasoning": extra.get("reasoning") or "",
        "calls": [[c.function.name, c.function.arguments] for c in message.tool_calls or []],
        "finish": choice.finish_reason,
    }


# --- calls ----------------------------------------------------------------------------------------


async def test_a_call(sdk, engine):
    engine.answer = [CALL]
    answer = await ask(sdk, tools=[tool(description="d", strict=None)])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_") and len(call.id) > 20
    assert (call.function.name, call.function.arguments) == ("weather", PARIS)
    assert engine.model.chat_template.tools == [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
    ]  # fmt: skip
    params = engine.submitted[0].params
    assert params.structured_outputs is None and params.skip_special_tokens


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "No call at all, and spaces at the end  ",
        CALL,
        f"Let me see.\n{CALL}\n{CALL.replace('weather', 'news')} Done.",
        "<think>\nHm <tool_call>.\n</think>\n\n" + CALL,
        "<think>never ends ",
        '<tool_call>{"name": "weather", "arguments": {"city": oops}}</tool_call> rest',
        "<tool_call> is a marker",
    ],
)
async def test_a_stream_is_the_whole(sdk, engine, text, size):
    engine.answer = [text[i : i + size] for i in range(0, len(text), size)]
    body = {"tools": [tool(), tool("news")], "n": 2, "temperature": 1.0}
    whole = await ask(sdk, **body)
    expected = {choice.index: whole_answer(choice) for choice in whole.choices}
    assert await streamed(sdk, **body) == expected
    assert set(expected) == {0, 1}
    if "oops" in text:
        assert expected[0]["finish"] == "stop"
        assert expected[0]["calls"] == [["weather", '{"city": oops']]
        assert expected[0]["content"] == "}}</tool_call> rest"


async def test_ids_differ_between_calls_and_choices(sdk, engine):
    engine.answer = [CALL, CALL]
    answer = await ask(sdk, tools=[tool()], n=2, temperature=1.0)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(ids) == len(set(ids)) == 4


async def test_length_keeps_its_finish_reason(sdk, engine):
    engine.answer, engine.finish_reason = [CALL], "length"
    assert (await ask(sdk, tools=[tool()])).choices[0].finish_reason == "length"


async def test_none_leaves_calls_in_the_text(sdk, engine):
    engine.answer = [CALL]
    for body in ({"tools": [tool()], "tool_choice": "none"}, {"tools": []}, {}):
        message = (await ask(sdk, **body)).choices[0].message
        assert message.tool_calls is None and message.content == CALL


async def test_one_call_at_most(sdk, engine):
    engine.answer = [CALL + CALL]
    body = {"tools": [tool()], "parallel_tool_calls": False}
    assert len((await ask(sdk, **body)).choices[0].message.tool_calls) == 1
    assert len((await streamed(sdk, **body))[0]["calls"]) == 1


async def test_logprobs_cover_every_token(sdk, engine):
    engine.answer = [*THINK, CALL]
    body = {"tools": [tool()], "logprobs": True}
    whole = await ask(sdk, **body)
    assert len(whole.choices[0].logprobs.content) == len(engine.answer)
    count = 0
    async for chunk in await ask(sdk, stream=True, **body):
        for choice in chunk.choices:
            count += len(choice.logprobs.content) if choice.logprobs else 0
    assert count == len(engine.answer)


async def test_a_conversation_with_calls_reaches_the_template(client, sdk, engine):
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function",
                 "function": {"name": "weather", "arguments": PARIS}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]  # fmt: skip
    await ask(sdk, messages=messages, tools=[tool()])
    count = await client.post("/tokenize", json={"messages": messages, "tools": [tool()]})
    assert count.json()["tokens"] == engine.submitted[0].prompt
    assert engine.model.chat_template.tools[0]["function"]["name"] == "weather"


# --- what is enforced -----------------------------------------------------------------------------


def grammar(engine) -> str:
    return to_spec(engine.submitted[-1].params.structured_outputs).text


async def test_required_is_forced_in_the_models_own_format(sdk, engine):
    engine.answer = [CALL]
    answer = await ask(sdk, tools=[tool(), tool("news")], tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert engine.grammar_threads
    text = grammar(engine)
    assert '"<tool_call>\\n{\\"name\\": \\"news\\", \\"arguments\\": "' in text
    assert text.count('"city"') == 4 and ")*" in text
    await ask(sdk, tools=[tool()], tool_choice="required", parallel_tool_calls=False)
    assert ")*" not in grammar(engine)


async def test_a_named_function_is_the_only_one(sdk, engine):
    engine.answer = [CALL]
    await ask(sdk, tools=[tool(), tool("news")], tool_choice=named("weather"))
    assert "weather" in grammar(engine) and "news" not in grammar(engine)
    assert ")*" not in grammar(engine)


async def test_allowed_tools(sdk, engine):
    engine.answer = [CALL]
    allowed = {"mode": "required", "tools": [named("weather")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    await ask(sdk, tools=[tool(), tool("news")], tool_choice=choice)
    assert "weather" in grammar(engine) and "news" not in grammar(engine)
    assert len(engine.model.chat_template.tools) == 2
    allowed["mode"] = "auto"
    await ask(sdk, tools=[tool(), tool("news")], tool_choice=choice)
    assert "[lazy]" in grammar(engine) and "news" not in grammar(engine)


async def test_without_a_format_plain_json_is_forced(sdk, engine):
    engine.model.chat_template.source = "no format"
    engine.answer = ['[{"name": "weather", ', f'"parameters": {PARIS}}}]']
    for body in ({"tool_choice": "required"}, {"tool_choice": named("weather")}):
        answer = (await streamed(sdk, tools=[tool()], **body))[0]
        assert answer["calls"] == [["weather", PARIS]] and answer["content"] == ""
    message = await refused(sdk, "tool_choice", tools=[tool()])
    assert "--tool-call-parser" in message


async def test_strict_functions_are_guided_from_the_marker_on(client, sdk, engine):
    engine.answer = [CALL]
    await ask(sdk, tools=[tool(strict=True), tool("news")])
    text = grammar(engine)
    assert "[lazy]" in text and text.count('"city"') == 2 and "news" in text
    engine.model.chat_template.source = "<|python_tag|>"
    body = {"messages": HI, "tools": [tool(strict=True)]}
    response = await client.post("/v1/chat/completions", json=body)
    assert "strict" in response.json()["warnings"][0]
    assert engine.submitted[-1].params.structured_outputs is None


async def test_a_schema_that_cannot_be_enforced_is_the_tools_fault(sdk, engine):
    broken = tool(parameters={"type": "object", "$ref": "#/broken"})
    message = await refused(sdk, "tools", tools=[broken], tool_choice="required")
    assert "a schema is broken" in message
    schema = {"response_format": {"type": "json_object"}}
    await refused(sdk, "tool_choice", tools=[tool()], tool_choice="required", **schema)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
        ("tools", {"tools": [tool(), tool()]}),
        ("tools", {"tools": [tool(parameters={"type": "string"})]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [tool()], "tool_choice": "always"}),
        ("tool_choice", {"tools": [tool()], "tool_choice": named("other")}),
        ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "function"}}),
        ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "mcp", "server_label": "x"}}),
        ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}),
        ("body.tools.0.function.name", {"tools": [tool("two words")]}),
        ("body.tools.0.type", {"tools": [{"function": {"name": "f"}}]}),
        ("functions", {"functions": [{"name": "f"}]}),
    ],
)
async def test_what_is_refused(sdk, engine, param, body):
    await refused(sdk, param, **body)
    assert engine.submitted == []


# --- reasoning ------------------------------------------------------------------------------------


async def test_reasoning_is_apart_and_counted(sdk, engine):
    engine.answer = THINK
    answer = await ask(sdk)
    assert whole_answer(answer.choices[0]) == {
        "content": "Yes.", "reasoning": "It is simple.", "calls": [], "finish": "stop",
    }  # fmt: skip
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5
    assert answer.usage.completion_tokens == len(THINK)
    usage = None
    async for chunk in await ask(sdk, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
    assert usage.completion_tokens_details.reasoning_tokens == 5
    hidden = (await streamed(sdk, extra_body={"include_reasoning": False}))[0]
    assert (hidden["content"], hidden["reasoning"]) == ("Yes.", "")


async def test_the_prompt_may_have_opened_it(sdk, engine):
    engine.model.chat_template.prompt_end = "assistant: <think>\n"
    engine.answer = THINK[1:]
    answer = await ask(sdk, messages=[{"role": "user", "content": "what is </think>?"}])
    assert answer.choices[0].message.model_extra["reasoning"] == "It is simple."
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5
    thinking = engine.submitted[0].thinking
    assert thinking.inside
    assert thinking.end == engine.model.tokenizer.encode("</think>", add_special_tokens=False)


async def test_a_client_cannot_open_it(sdk, engine):
    engine.answer = ["Just ", "text."]
    for content in ("<think>", "what is <think>"):
        answer = await ask(sdk, messages=[{"role": "user", "content": content}])
        assert answer.choices[0].message.content == "Just text."
    assert not engine.submitted[0].thinking.inside


@pytest.mark.parametrize("flags", [{"reasoning_parser": "none"}, {"tool_call_parser": "none"}])
async def test_parsers_can_be_turned_off(make_client, engine, flags):
    engine.answer = [*THINK, CALL]
    body = {"messages": HI, "tools": [tool()], "tool_choice": "auto"}
    response = await make_client(**flags).post("/v1/chat/completions", json=body)
    if "tool_call_parser" in flags:
        assert response.json()["error"]["param"] == "tool_choice"
    else:
        assert response.json()["choices"][0]["message"]["content"].startswith("<think>")


async def test_a_wrong_parser_name_ends_the_start(make_client):
    for flags in ({"reasoning_parser": "x"}, {"tool_call_parser": "x"}):
        with pytest.raises(ConfigError, match=next(iter(flags))):
            make_client(**flags)


# --- markers that are special tokens --------------------------------------------------------------


async def test_special_markers_are_shown_and_other_special_tokens_are_not(sdk, engine):
    engine.model.chat_template.source = MISTRAL
    engine.model.tokenizer.special_texts = frozenset({"[TOOL_CALLS]", "<s>", "<eos>"})
    engine.answer = [
        "Hm",
        "<s>",
        ". ",
        "[TOOL_CALLS]",
        '[{"name": "weather", ',
        '"arguments": {}}]',
        "<eos>",
    ]
    answer = await ask(sdk, tools=[tool()])
    assert not engine.submitted[0].params.skip_special_tokens
    assert whole_answer(answer.choices[0]) == {
        "content": "Hm.", "reasoning": "", "calls": [["weather", "{}"]], "finish": "tool_calls",
    }  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    assert len(call.id) == 9 and call.id.isalnum()
    await ask(sdk)
    assert engine.submitted[-1].params.skip_special_tokens


@pytest.mark.parametrize("name", [n for n, form in TOOL_FORMATS.items() if form.forced])
async def test_what_is_forced_is_what_is_read(name):
    """The grammar's own text, read by the format's parser."""
    from quire.text.parsing import gathered, output_format

    form = TOOL_FORMATS[name]
    before, between, after = form.forced
    opening, separator, closing = form.listed
    calls = [f"{before}weather{between}{PARIS}{after}", f"{before}news{between}{{}}{after}"]
    text = opening + separator.join(calls) + closing
    parser = output_format(name, "none", "").parser({"weather": {}, "news": {}}, inside=False)
    answer = gathered(parser.push(text, final=True))
    assert [(c.name, c.arguments) for c in answer.calls] == [("weather", PARIS), ("news", "{}")]
    assert answer.content == ""


@pytest.mark.parametrize("count", [40, 128])
async def test_a_large_set_of_tools_is_within_the_limits(sdk, engine, count):
    """Beyond 200 KB with descriptions; the grammar they leave is real, the engine scripted."""
    engine.answer = list(CALL)
    answer = await ask(sdk, tools=mcp_tools(count), tool_choice="required", max_tokens=200)
    assert answer.choices
    grammar = to_spec(engine.submitted[0].params.structured_outputs)
    assert f"tool_{count - 1}" in grammar.text and "narrow filters" not in grammar.text

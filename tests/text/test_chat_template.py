# ruff: noqa: E501 (templates)
"""Chat templates against transformers' jinja2, their budget, and what requests may put in."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError, InvalidParameterError
from quire.text import ChatTemplate, read_chat_template
from quire.text.chat_messages import Json
from quire.text.jinja_fallback import Jinja2Template
from quire.text.template_engine import (
    MiniJinjaTemplate,
    TemplateBudgetError,
    TemplateFailedError,
    TemplateRefusedError,
    UnknownDialectError,
)
from tests.text import dialects

Message = dict[str, object]

TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather "now" in <city> & more, 天気',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "Zürich"]},
                    "days": {"type": "integer", "default": 1},
                    "exact": {"type": "boolean", "default": True, "nullable": None},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}, "return": {"x": 1.5}}},
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich <&>", "days": 2}},
}
USER: Message = {"role": "user", "content": "hello <b> \"you\" & 'me' 你好 🙂"}
SYSTEM: Message = {"role": "system", "content": " Be brief.\n"}
ASSISTANT: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSure. "}
CONVERSATIONS: dict[str, list[Message]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": " and\n\nthen? "}],
    "reasoning": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "\nwhy\n"}],
    "ends_in_assistant": [USER, ASSISTANT],
    "tool_call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "tool",
            "content": '{"t": 21}',
            "tool_call_id": "call00001",
            "name": "get_weather",
        },
    ],
    "empty_text": [{"role": "user", "content": ""}],
    "wrong_order": [ASSISTANT, USER, USER],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(source: str, messages: Sequence[Message], **options: object) -> str | None:
    """What transformers renders, or None where it raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [copy.deepcopy(list(messages))],
            chat_template=source,
            **{"add_generation_prompt": True} | TOKENS | options,
        )
    except Exception:
        return None
    return rendered[0]


def ours(source: str, messages: Sequence[Message], **options: object) -> str | None:
    template = ChatTemplate(source, **TOKENS)
    try:
        return template.render(messages, **options)  # type: ignore[arg-type]
    except InvalidParameterError:
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("dialect", dialects.BY_NAME)
def test_same_as_transformers(dialect: str, conversation: str) -> None:
    source, messages = dialects.BY_NAME[dialect], CONVERSATIONS[conversation]
    if dialect == "parts_only":
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"] or ""}]} for m in messages
        ]
    variants: list[dict[str, object]] = [
        {},
        {"tools": TOOLS},
        {"add_generation_prompt": False},
        {"enable_thinking": False, "date_string": "1 Jan 2026"},
    ]
    for options in variants:
        theirs = reference(source, messages, **options)
        if theirs is None and conversation == "tool_call":
            continue  # we render more: test_template_facts.py
        if theirs is not None:
            theirs = theirs.replace("<a>None", "<a>")  # no content, printed as a word
        assert ours(source, messages, **options) == theirs, options


@pytest.mark.parametrize("dialect", dialects.BY_NAME)
@pytest.mark.parametrize("content", ["Sure", "Sure, I", "  padded  ", "line\n", "a " * 50])
def test_continue_final_message_same_as_transformers(dialect: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    if dialect == "parts_only":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    if dialect == "methods_of_python":  # it rewrites the message; both must notice
        assert ours(dialects.BY_NAME[dialect], messages, **options) is None
        return
    theirs = reference(dialects.BY_NAME[dialect], messages, **options)
    assert theirs is not None
    assert ours(dialects.BY_NAME[dialect], messages, **options) == theirs


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    contents=st.lists(st.text(max_size=20), min_size=1, max_size=5),
    arguments=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
@settings(max_examples=50)
@pytest.mark.parametrize("dialect", ["chatml", "llama3", "mistral", "qwen", "deepseek"])
def test_same_as_transformers_for_any_text(
    dialect: str, contents: list[str], arguments: Mapping[str, object]
) -> None:
    roles = ["user", "assistant"] * len(contents)
    messages: list[Message] = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    source = dialects.BY_NAME[dialect]
    if dialect == "chatml":
        messages.pop()
    assert ours(source, messages, tools=TOOLS) == reference(source, messages, tools=TOOLS)


EXPRESSIONS = """
{{ x | tojson(indent=2) }} {{ x | tojson(separators=(',', ':')) }} {{ x | tojson(sort_keys=true) }}
{{ x }} {{ true }} {{ none }} {{ 1.0 }} {{ [true, none, 'it''s'] | length }}
{{ text | indent(2) }}|{{ text | indent(2, first=true) }}|{{ text | indent(width=3) }}
{{ 'a' is sequence }} {{ x is sequence }} {{ x is iterable }} {{ 'a' is iterable }} {{ x is mapping }}
{{ text.strip().split('\\n') }} {{ text.splitlines() }} {{ text[::-1] }} {{ text[-1:] }}
{{ x.items() | list }} {{ x | items | list }} {{ x | dictsort }} {{ x.get('zz', 'd') }}
{{ undefined_thing }} {{ undefined_thing is defined }} {{ undefined_thing or 'default' }}
{{ undefined_thing.attribute }}
{{ undefined_thing | length }} {{ none is iterable }} {{ tools is iterable }} {{ x.k is iterable }}
{{ ''[::-1] }}{{ messages[1:][::-1] }}
{{ 'abc' | int }} {{ '7' | int + 1 }} {{ '\x1c a \x1f' | trim }}|
{{ 'a' + none }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'eq', 'user') | list | length }}
{% for k, v in x.items() %}{{ k }}={{ v }}{% if not loop.last %},{% endif %}{% endfor %}
{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% macro f(a, b='z') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}{{ f('q', 'r') }}
{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}
{% set block %}captured {{ x.k }}{% endset %}{{ block | upper }}
{{ '%s' | format('a') }} {{ 'a,b' | replace(',', ';') }} {{ ['b', 'a'] | sort | first }} {{ 7 // 2 }} {{ 7 / 2 }}
{{ dict(a=1) }} {{ [1, 2] + [3] }} {{ 'a' ~ 1 ~ none }} {{ 'x' * 3 }} {{ 2 ** 8 }} {{ -7 % 3 }}
{{ text.partition('b') }} {{ text.removeprefix('a') }} {{ text | wordcount }}
{% for part in text.rsplit('b', 1) %}[{{ part }}]{% endfor %}
""".strip().split("\n")


@pytest.mark.parametrize("line", EXPRESSIONS)
def test_expressions_same_as_transformers(line: str) -> None:
    values: Message = {"x": {"k": [1, {"z": None}], "b": True, "<": "é\n"}, "text": "a\n b\n\nc\n"}
    assert ours(line, [USER], **values) == reference(line, [USER], **values)


# --- content: strings, parts, nothing ---


def test_parts_are_joined_for_templates_that_take_strings() -> None:
    template = ChatTemplate(dialects.CHATML)
    assert (template.content_support.strings, template.content_support.parts) == (True, False)
    parts = [
        {"type": "text", "text": "one"},
        {"type": "input_text", "text": "two"},
        "three",
        {"type": "refusal", "refusal": "no"},
    ]
    rendered = template.render([{"role": "user", "content": parts}])
    assert "one\ntwo\nthree\nno<|im_end|>" in rendered


def test_strings_are_wrapped_for_templates_that_take_parts() -> None:
    template = ChatTemplate(dialects.PARTS_ONLY)
    assert (template.content_support.strings, template.content_support.parts) == (False, True)
    assert template.render([USER]) == f"[user]\n{USER['content']}[end]\n[assistant]"


def test_templates_that_take_both_get_what_was_sent() -> None:
    template = ChatTemplate(dialects.GEMMA_PARTS)
    assert (template.content_support.strings, template.content_support.parts) == (True, True)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "onetwo<end_of_turn>" in template.render([{"role": "user", "content": parts}])
    joined = ChatTemplate(dialects.GEMMA_PARTS, content_format="string")
    assert "one\ntwo<end_of_turn>" in joined.render([{"role": "user", "content": parts}])


@pytest.mark.parametrize("dialect", ["chatml", "llama2", "llama3", "mistral", "qwen", "deepseek"])
def test_detection_does_not_take_a_printed_list_for_text(dialect: str) -> None:
    support = ChatTemplate(dialects.BY_NAME[dialect], **TOKENS).content_support
    assert support.strings
    assert not support.parts


def test_forced_parts() -> None:
    template = ChatTemplate("{{ messages[0].content | tojson }}", content_format="openai")
    assert json.loads(template.render([{"role": "user", "content": "hi"}])) == [
        {"type": "text", "text": "hi"}
    ]


def test_missing_content_stays_none_beside_tool_calls_and_is_empty_otherwise() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content is none }}:{{ m.content or '' }}"
        "{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}"
    )
    messages = [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "tool_calls": [CALL], "content": None},
        {"role": "assistant", "tool_calls": [], "content": None},
    ]
    rendered = template.render(messages)
    assert re.sub(r"\[.*\]", "calls", rendered) == "False:;False:;True:calls;False:;"


def test_null_fields_and_empty_tool_calls_are_dropped() -> None:
    template = ChatTemplate("{{ messages[0] | tojson(sort_keys=true) }}")
    dumped = {"role": "assistant", "content": "x", "tool_calls": [], "name": None, "refusal": None}
    assert json.loads(template.render([dumped])) == {"role": "assistant", "content": "x"}
    assert dumped["tool_calls"] == []  # the caller's own message is left alone


def test_tool_call_arguments_are_parsed() -> None:
    text = {
        **CALL,
        "function": {"name": "get_weather", "arguments": '{"city": "Zürich <&>", "days": 2}'},
    }
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [text]}]
    expected = reference(
        dialects.LLAMA3, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    )
    assert ours(dialects.LLAMA3, messages) == expected
    assert text["function"]["arguments"].startswith("{")  # type: ignore[index]
    empty = {**CALL, "function": {"name": "now", "arguments": ""}}
    template = ChatTemplate(dialects.LLAMA3, **TOKENS)
    calls: Message = {"role": "assistant", "tool_calls": [empty]}
    assert '"parameters": {}}' in template.render([USER, calls])


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_name(field: str) -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}")
    assert template.render([{"role": "assistant", "content": "x", field: "R"}]) == "R/R"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        None,
        [5],
        ["hello"],
        [{}],
        [{"content": "no role"}],
        [{"role": 3, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": [{"text": "no type"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        [{"role": "user", "content": "lone \ud800 surrogate"}],
        [{"role": "user\udfff", "content": "x"}],
        [{"role": "user", "content": "x", "extra": object()}],
        [{"role": "user", "content": "x", "extra": b"bytes"}],
        [{"role": "assistant", "content": "x", "tool_calls": "yes"}],
    ],
)
def test_malformed_messages_are_typed_errors(messages: object) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        ChatTemplate(dialects.QWEN, **TOKENS).render(messages)  # type: ignore[arg-type]
    assert caught.value.param == "messages"


def test_deep_nesting_is_refused() -> None:
    deep: object = "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(InvalidParameterError, match="deeper than 64"):
        ChatTemplate(dialects.CHATML).render([{"role": "user", "content": "x", "extra": deep}])
    nested = {**CALL, "function": {"name": "f", "arguments": "[" * 100_000 + "]" * 100_000}}
    with pytest.raises(InvalidParameterError, match="arguments"):
        ChatTemplate(dialects.CHATML).render([{"role": "assistant", "tool_calls": [nested]}])


# --- errors ---


def test_the_templates_own_words_reach_the_client() -> None:
    with pytest.raises(InvalidParameterError, match="Conversation roles must alternate") as caught:
        ChatTemplate(dialects.LLAMA2, **TOKENS).render([ASSISTANT, USER])
    assert caught.value.param == "messages"


def test_internal_failures_are_described_in_fixed_words() -> None:
    template = ChatTemplate("{{ messages[0].content.secret_field.x + 1 }}")
    with pytest.raises(InvalidParameterError) as caught:
        template.render([USER])
    assert "secret_field" not in str(caught.value)
    assert "minijinja" not in str(caught.value)


def test_a_template_that_is_no_jinja_is_refused_at_once() -> None:
    for source in ("{% if %}", "{{ unclosed", "{% for x in %}{% endfor %}", "{{ 1 +* 2 }}"):
        with pytest.raises(InvalidParameterError) as caught:
            ChatTemplate(source)
        assert caught.value.param == "chat_template"


def test_continue_final_message_errors() -> None:
    template = ChatTemplate(dialects.CHATML)
    with pytest.raises(InvalidParameterError, match="add_generation_prompt=false") as caught:
        template.render([USER], continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    hides = ChatTemplate("{{ messages[0].role }}")
    with pytest.raises(InvalidParameterError, match="does not show"):
        hides.render([USER], continue_final_message=True, add_generation_prompt=False)
    nothing: Message = {"role": "assistant", "tool_calls": [CALL]}
    with pytest.raises(InvalidParameterError, match="no text"):
        template.render([USER, nothing], continue_final_message=True, add_generation_prompt=False)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bos_token": "x"},
        {"chat_template": "{{ 1 }}"},
        {"tokenize": True},
        {"raise_exception": "x"},
        {"__class__": 1},
        {"f": object()},
        {"big": "x" * 70_000},
        {f"k{i}": 1 for i in range(65)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_chat_template_kwargs_are_bounded(kwargs: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        ChatTemplate(dialects.CHATML, **TOKENS).render([USER], **kwargs)  # type: ignore[arg-type]
    assert caught.value.param == "chat_template_kwargs"


def test_read_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "chatml.jinja"
    path.write_text(dialects.CHATML, encoding="utf-8")
    assert read_chat_template(str(path)) == dialects.CHATML
    assert read_chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match="--chat-template"):
        read_chat_template(str(tmp_path / "absent.jinja"))


# --- budget ---

BOMBS = {
    "30M iterations": "{% for i in range(30000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}",
    "range": "{{ range(1000000000) | list | length }}",
    "huge string": "{{ ('a' * 10000000) * 1000 }}",
    "huge list": "{{ ([1] * 10000000) * 1000 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "exponential recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "power": "{{ 10 ** 100000000 }}",
    "long output": "{% for i in range(100000) %}{{ '0123456789' * 1000 }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y' * 1000000) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_in_a_typed_error(bomb: str) -> None:
    guarded = "{% if messages[0].content == 'go' %}" + BOMBS[bomb] + "{% endif %}"
    template = ChatTemplate(guarded, fuel=500_000, max_output_chars=100_000)
    with pytest.raises(InvalidParameterError) as caught:
        template.render([{"role": "user", "content": "go"}])
    assert caught.value.param == "messages"
    assert template.render([USER]) == ""  # and the template is still good


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_in_jinja2_too(bomb: str) -> None:
    template = Jinja2Template(BOMBS[bomb], max_output_chars=100_000)
    with pytest.raises((TemplateBudgetError, TemplateFailedError)):
        template.render({})


@pytest.mark.parametrize("printed", ["'0123456789' * 100", "[12345678] * 100"])
def test_output_ends_at_its_limit_and_not_after_it(printed: str) -> None:
    """Fuel alone would let a loop print for as long as it turns, a gigabyte and more."""
    turned: list[int] = []
    template = MiniJinjaTemplate(
        "{% for i in range(turns) %}{% set _ = turn(i) %}{{ " + printed + " }}{% endfor %}",
        fuel=1_000_000,
        max_output_chars=10_000,
    )
    context: dict[str, Json] = {"turns": 5000, "turn": turned.append}  # type: ignore[dict-item]
    with pytest.raises(TemplateBudgetError, match="output"):
        template.render(context)
    assert len(turned) <= 11
    assert template.render({**context, "turns": 5})  # each render has the whole limit


def test_long_conversations_fit_the_budget() -> None:
    messages: list[Message] = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 20}
        for i in range(4000)
    ]
    for dialect in ("chatml", "llama3", "qwen"):
        rendered = ChatTemplate(dialects.BY_NAME[dialect], **TOKENS).render(messages, tools=TOOLS)
        assert rendered.count("word") == 80_000


# --- the fallback ---


def test_jinja2_takes_over_where_minijinja_lacks_a_method() -> None:
    template = ChatTemplate("{{ messages[0].content.rsplit('.', 1)[0] }}")
    assert template.render([{"role": "user", "content": "a.b.c"}]) == "a.b"
    assert isinstance(template._engine, Jinja2Template)
    usual = ChatTemplate(dialects.QWEN)
    usual.render([USER])
    assert isinstance(usual._engine, MiniJinjaTemplate)


def test_a_panic_in_minijinja_is_no_worse_than_an_error() -> None:
    source = "{{ messages[0].content[::-1] }}"
    engine = MiniJinjaTemplate(source, fuel=1000, max_output_chars=1000)
    empty: list[dict[str, object]] = [{"role": "user", "content": ""}]
    try:
        engine.render({"messages": empty})  # type: ignore[dict-item]
    except TemplateFailedError:
        pass  # a version that still panics
    template = ChatTemplate(source)
    assert template.render(empty) == ""
    assert template.render([{"role": "user", "content": "abc"}]) == "cba"
    assert isinstance(template._engine, MiniJinjaTemplate)


def test_bad_data_does_not_switch_engines() -> None:
    template = ChatTemplate("{{ messages[0].extra.strip() }}{{ messages[0].content }}")
    with pytest.raises(InvalidParameterError):
        template.render([{"role": "user", "content": "x", "extra": [1]}])
    assert isinstance(template._engine, MiniJinjaTemplate)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
        "{{ messages.append.__self__.__class__ }}",
    ],
)
def test_templates_cannot_reach_python(source: str) -> None:
    for engine in (
        MiniJinjaTemplate(source, fuel=10_000, max_output_chars=10_000),
        Jinja2Template(source, max_output_chars=1000),
    ):
        try:
            text = engine.render({"messages": []})
        except (TemplateFailedError, TemplateRefusedError, UnknownDialectError):
            continue
        assert "<class" not in text
        assert "json" not in text
        assert text in ("", "1")


def test_templates_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "x", "extra": [1]}]
    before = copy.deepcopy(messages)
    source = "{{ messages[0].extra.append(2) }}{{ messages[0].update({'content': 'y'}) }}"
    ours(source, messages)
    assert messages == before

"""Every format, whole and in every cutting; what is no call stays text; hostile text costs linear work."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.text.parsing import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    merged,
    output_format,
)
from quire.text.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from quire.text.parsing.json_scanner import JsonScanner

TOOLS = {
    "f": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "x": {}},
    },
    "get_weather": {"type": "object"},
}


def make(tool: str, reasoning: str = "none", *, inside: bool = False, tools=TOOLS):
    return output_format(tool, reasoning, "").parser(tools, inside=inside)


def parse(text: str, tool: str, reasoning: str = "none", *, cuts=(), **options):
    parser = make(tool, reasoning, **options)
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    events = []
    for position, piece in enumerate(pieces):
        events += parser.push(piece, final=position == len(pieces) - 1)
    return merged(events)


def call(index: int, name: str, arguments: str) -> list:
    return [ToolCallStart(index, name), ToolCallArguments(index, arguments), ToolCallEnd(index)]


A1 = '{"a": 1}'
GOOD = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', call(0, "f", A1)),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"arguments": {"s": "</tool_call>"}, "name": "get_weather"}</tool_call>\nDone.',
        [
            TextDelta("Let me see."),
            *call(0, "f", A1),
            *call(1, "get_weather", '{"s": "</tool_call>"}'),
            TextDelta("Done."),
        ],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}")),
    (
        "hermes",
        r'<tool_call>{"id": 7, "name": "f", "arguments": "{\"a\": 1}"}</tool_call>',
        call(0, "f", A1),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', call(0, "f", A1)),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "two\nlines"}}</tool_call>',
        call(0, "f", '{"s": "two\\nlines"}'),
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n1\n2 <b>\n"
        "</parameter>\n<parameter=x>\nTrue\n</parameter>\n</function>\n</tool_call>",
        call(0, "f", '{"a": 1, "s": "1\\n2 <b>", "x": true}'),
    ),
    ("qwen3_coder", "<tool_call><function=f></function></tool_call>", call(0, "f", "{}")),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', call(0, "f", A1)),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}; '
        '{"name": "f", "parameters": {}}',
        [*call(0, "f", A1), *call(1, "f", "{}")],
    ),
    ("llama3_json", '<function=f>{"a": 1}</function>', call(0, "f", A1)),
    (
        "pythonic",
        "[f(a=1, s='it\\'s \"ok\" \\u00e9\\n', x=[True, {'k': None}, (-1.5e3,)]), get_weather()]",
        [
            *call(
                0,
                "f",
                '{"a": 1, "s": "it\'s \\"ok\\" \\u00e9\\n", "x": [true, {"k": null}, [-1.5e3]]}',
            ),
            *call(1, "get_weather", "{}"),
        ],
    ),
    ("llama4_pythonic", "<|python_start|>[f(a=1)]<|python_end|>", call(0, "f", A1)),
    (
        "mistral",
        'Sure. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "f"}]',
        [TextDelta("Sure."), *call(0, "f", A1), *call(1, "f", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}',
        [*call(0, "f", A1), *call(1, "f", A1), *call(2, "f", "{}")],
    ),
    (
        "deepseek_v3",
        "Hm<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"a": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n'
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [TextDelta("Hm"), *call(0, "f", A1), *call(1, "f", "{}")],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        call(0, "f", A1),
    ),
    (
        "openai",
        '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary '
        'to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        [ReasoningDelta("Hm."), *call(0, "f", A1)],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>final<|message|>Yes",
        [ReasoningDelta("a < b"), TextDelta("Yes")],
    ),
    (
        "openai",
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        call(0, "f", A1),
    ),
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', call(0, "f", A1)),
    ("jamba", '<tool_calls>[\n{"name": "f", "arguments": {"a": 1}}\n]</tool_calls>',
     call(0, "f", A1)),
    ("phi4_mini_json", 'functools[{"name": "f", "arguments": {"a": 1}}]', call(0, "f", A1)),
    ("internlm", '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": 1}}<|action_end|>\n',
     call(0, "f", A1)),
]  # fmt: skip
TEXTS = [
    ("hermes", ""),
    ("hermes", "just text, with spaces at its end  \n"),
    ("hermes", "a <tool_cal"),
    ("hermes", "<tool_call> no object </tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "' + "n" * 400 + '", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arg'),
    ("hermes", '{"name": "f", "arguments": {}}'),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", '{"age": 3, "name": "f", "parameters": {}}'),
    ("llama3_json", 'Here: {"name": "f", "parameters": {}}'),
    ("llama3_json", "[1, 2]"),
    ("pythonic", "[g(a=1)]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f](link) and [f (x)"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("qwen3_coder", "<tool_call>\n<function=f"),
    ("deepseek_v31", "<｜tool▁call▁begin｜>no separator<｜tool▁call▁end｜>"),
    ("openai", "no channels at all"),
    ("openai", "<|channel|>never a message" + "x" * 600),
]
BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> rest'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 200 + "1" + "}" * 200),
    ("pythonic", "[f(a=open('x'))]"),
    ("pythonic", "[f(a=" + "[" * 100 + "]" * 100 + ")]"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"nam'),
    ("qwen3_coder", "<tool_call><function=f><parameter=s>cut off"),
    ("openai", "<|channel|>commentary to=functions.f<|message|>{broken}<|call|>"),
    ("openai", "<|channel|>commentary to=functions.f<|message|>not json<|call|>"),
]
ALL = [(tool, text) for tool, text, _ in GOOD] + TEXTS + BROKEN


@pytest.mark.parametrize(("tool", "text", "events"), GOOD)
def test_calls(tool, text, events):
    assert parse(text, tool) == events
    for event in events:
        if isinstance(event, ToolCallArguments):
            assert isinstance(json.loads(event.text), dict)


@pytest.mark.parametrize(("tool", "text"), TEXTS)
def test_what_is_no_call_is_text(tool, text):
    assert "".join(event.text for event in parse(text, tool)) == text
    assert all(isinstance(event, TextDelta) for event in parse(text, tool))


@pytest.mark.parametrize(("tool", "text"), BROKEN)
def test_arguments_that_break_off_leave_the_call_open(tool, text):
    events = parse(text, tool)
    starts = [event.index for event in events if isinstance(event, ToolCallStart)]
    ends = [event.index for event in events if isinstance(event, ToolCallEnd)]
    assert ends == starts[: len(ends)]
    assert len(ends) < len(starts) or any(isinstance(e, TextDelta) for e in events)


@pytest.mark.parametrize(("tool", "text"), ALL)
def test_cut_anywhere_and_everywhere(tool, text):
    whole = parse(text, tool)
    for cut in range(1, len(text)):
        assert parse(text, tool, cuts=[cut]) == whole, cut
    assert parse(text, tool, cuts=range(len(text))) == whole


ALPHABET = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": ', "1", "}", "}", "]", "[",
    "[f(", "a=", ")", "<think>", "</think>", "\n", " ", ",", '"', "'", "\\", "text", "<", "｜",
    "[TOOL_CALLS]", "f", "[ARGS]", "<function=f>", "<parameter=s>", "</parameter>", "</function>",
    "<|channel|>analysis", "<|message|>", "<|end|>", "<|start|>", " to=functions.f", "<｜tool▁sep｜>",
    "<｜tool▁call▁begin｜>", "<|python_tag|>", ";", "true", "\\u12", "é", "\x00",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.sampled_from(["none", "qwen3", "granite"]),
    st.booleans(),
    st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join),
    st.lists(st.integers(0, 1 << 16), max_size=8),
)
def test_any_text_in_any_cutting(tool, reasoning, inside, text, cuts):
    options = {"reasoning": reasoning, "inside": inside}
    whole = parse(text, tool, **options)
    assert parse(text, tool, cuts=cuts, **options) == whole
    assert parse(text, tool, cuts=range(len(text)), **options) == whole
    open_calls = set()
    for event in whole:
        if isinstance(event, ToolCallStart):
            open_calls.add(event.index)
        elif isinstance(event, ToolCallEnd):
            open_calls.remove(event.index)
            arguments = [e.text for e in whole
                         if isinstance(e, ToolCallArguments) and e.index == event.index]  # fmt: skip
            assert isinstance(json.loads("".join(arguments)), dict)


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "events"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, [ReasoningDelta("hm"), TextDelta("Yes.")]),
        ("hm\n</think>\n\nYes.", True, [ReasoningDelta("hm"), TextDelta("Yes.")]),
        ("\n<think>hm</think>Yes.", True, [ReasoningDelta("hm"), TextDelta("Yes.")]),
        ("<think>\n\n</think>\n\nYes.", False, [TextDelta("Yes.")]),
        ("<think>cut off ", False, [ReasoningDelta("cut off ")]),
        ("The tag <think>x</think>.", False, [TextDelta("The tag <think>x</think>.")]),
        (
            'hm</think><tool_call>{"name": "f"}</tool_call>',
            True,
            [ReasoningDelta("hm"), *call(0, "f", "{}")],
        ),
    ],
)
def test_thinking(text, inside, events):
    for cuts in ((), range(len(text))):
        assert parse(text, "hermes", "deepseek_r1", inside=inside, cuts=cuts) == events


def test_whether_a_prompt_ends_inside():
    form = output_format("none", "qwen3", "")
    assert form.inside("user: <think>?\nassistant: <think>\n")
    assert not form.inside("assistant: <think>\n\n</think>\n\n")
    assert not form.inside("user: what does <think> mean?\nassistant:")
    assert form.inside("...", continued="<think>so far")
    assert not form.inside("...", continued="<think>a</think> b")
    tokens = form.thinking(lambda text: [len(text)], inside=True)
    assert (tokens.start, tokens.end, tokens.inside) == ([7], [8], True)
    assert output_format("none", "none", "").thinking(lambda text: [], inside=False) is None


def test_without_tools_calls_are_text():
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert parse(text, "hermes", tools=None) == [TextDelta(text)]
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert parse(text, "openai", tools=None) == [TextDelta("{}")]


# --- special tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), range(200)])
def test_special_tokens_are_hidden_but_for_markers(cuts):
    form = output_format("mistral", "none", "")
    hidden = frozenset({"[TOOL_CALLS]", "<unk>", "</s>", "<unk>2", "[PAD]"})
    text = 'a<unk>b<un [<unk>2[PAD]1[TOOL_CALLS][{"name": "f"}]</s>'
    parser = form.parser(TOOLS, inside=False, hidden=hidden)
    bounds = [0, *[c for c in cuts if c < len(text)], len(text)]
    events = []
    for start, end in itertools.pairwise(bounds):
        events += parser.push(text[start:end], final=end == len(text))
    assert merged(events) == [TextDelta("ab<un [1"), *call(0, "f", "{}")]


# --- detection ------------------------------------------------------------------------------------


def test_auto_reads_the_template():
    builtin = "<tool_call>\n{{ call }}"
    assert output_format("auto", "auto", builtin).tools is TOOL_FORMATS["hermes"]
    assert output_format("auto", "auto", builtin).reasoning is None
    qwen = "<tool_call>{% if '</think>' in content %}"
    assert output_format("auto", "auto", qwen).reasoning is REASONING_FORMATS["qwen3"]
    assert output_format("auto", "none", qwen).reasoning is None
    for name, template in (
        ("qwen3_coder", "<tool_call><function=...>"),
        ("mistral", "[TOOL_CALLS] ["),
        ("mistral_args", "[TOOL_CALLS]name[ARGS]"),
        ("openai", "<|start|>assistant<|channel|>final"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>"),
        ("llama3_json", "<|python_tag|>"),
    ):
        assert output_format("auto", "none", template).tools is TOOL_FORMATS[name]
    assert output_format("auto", "auto", "plain").tools is None
    with pytest.raises(ConfigError, match="hermes"):
        output_format("herms", "auto", "")


# --- JSON, and the cost of it all -----------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    JSON, st.booleans(), st.text('{}[]",:\\ue-+.0123tfn \n', max_size=12), st.integers(0, 1 << 9)
)
def test_the_scanner_agrees_with_the_standard_library(value, ascii_only, noise, where):
    good = json.dumps(value, ensure_ascii=ascii_only)
    where %= len(good) + 1
    for text in (good, good[:where] + noise + good[where:], good[:where]):
        scanner = JsonScanner()
        _, end = scanner.scan(text, 0, len(text))
        accepted = scanner.finish() and not text[end:].strip(" \t\r\n")
        try:
            # Control characters in strings are mended, not refused; NaN is no JSON.
            json.loads(text, strict=False, parse_constant=int)
            expected = True
        except ValueError:
            expected = False
        assert accepted == expected, text


def lines_run(work) -> int:
    """How many lines of the package's code `work` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "quire/text/parsing" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(previous)
    return count


HOSTILE = [
    "<",
    "<tool_call>",
    '<tool_call>{"name": "',
    "<tool_call>{",
    "\n",
    '{"a": [',
    "[f(",
    "</",
    "\\",
]


@pytest.mark.parametrize("tool", ["hermes", "llama3_json", "pythonic", "mistral", "openai"])
@pytest.mark.parametrize("unit", HOSTILE)
def test_work_is_linear_and_little_is_held(tool, unit):
    def work(repeat: int) -> None:
        parser = make(tool, "none")
        for _ in range(repeat):
            parser.push(unit)
            assert parser._reader.unread <= 32 and len(parser._reader._text) <= 64
        parser.push("", final=True)

    small, large = lines_run(lambda: work(100)), lines_run(lambda: work(400))
    assert large < 5 * small

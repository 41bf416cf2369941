"""Every shape of conversation with every behaviour of a published template.

A prompt must show all that was said, print nothing for no content, and be transformers' prompt where
transformers takes the conversation as it was sent. The same table over HTTP:
`tests/server/test_template_table.py`.
"""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from quire.errors import InvalidParameterError
from quire.text import ChatTemplate
from quire.text import template_rewrites as rewrites
from quire.text.chat_messages import Turn, read_turns
from quire.text.template_facts import ContentSupport
from tests.text import conversations as c
from tests.text.published import BY_NAME, Published

NO_NOTATION = {"gemma-2", "gemma-3", "granite-3.3", "kimi-k2-queue", "smollm3", "llama-2", "vicuna",
               "alpaca", "chatml", "parts-only"}  # fmt: skip
"""Templates that show no calls: left out, as by transformers, or text where the template refuses them."""
NOTHING = re.compile(r"\b(?:None|null|undefined)\b|\[\](?!<\|assistant)")
OTHERWISE = {
    # As the system's, where a template prints any word for a role.
    "developer", "system, developer", "developer later",
    # The first message's, where one among the others is refused.
    "system last",
    # One message with what follows it, since the result follows.
    "call, then text", "call, then nothing", "two calls apart",
    # Some templates take null as a sign of calls.
    "assistant null", "reasoning, no content",
    *(name for name in c.SHAPES if name.startswith("arguments")),
}  # fmt: skip
"""Where we do not write what was sent, though transformers may take it."""


def template(published: Published) -> ChatTemplate:
    return ChatTemplate(published.source, **published.tokens)


TEMPLATES = {name: template(published) for name, published in BY_NAME.items()}


def transformers_prompt(published: Published, messages: object) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [copy.deepcopy(messages)],
            chat_template=published.source,
            add_generation_prompt=True,
            **published.tokens,
        )
    except Exception:
        return None
    return str(rendered[0])


def nothings(prompt: str) -> int:
    """How often a word for nothing is printed, but for Command R's own field."""
    return len(NOTHING.findall(prompt.replace('"is_error": null', "")))


def full_prompt(name: str) -> str:
    """Where everything has a text."""
    called = [c.system(), c.user(), c.assistant(tool_calls=[c.call(c.OBJECT)]), c.result()]
    return TEMPLATES[name].render([c.system(), *called, c.assistant(), c.LATER_USER])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_shape(name: str) -> None:
    """One test a template, so that a failure lists all of its shapes."""
    published = BY_NAME[name]
    failures = [
        f"{shape}: {problem}"
        for shape, problem in ((shape, problem_of(name, published, shape)) for shape in c.SHAPES)
        if problem
    ]
    assert not failures, "\n".join(failures)


def problem_of(name: str, published: Published, shape_name: str) -> str | None:
    shape = c.SHAPES[shape_name]
    messages = copy.deepcopy(list(shape.messages))
    try:
        prompt = TEMPLATES[name].render(messages)
    except InvalidParameterError as error:
        return f"refused: {error}"
    if messages != shape.messages:
        return "the caller's messages were changed"
    lost = [word for word in shape.words if word not in prompt]
    if lost and not (name in NO_NOTATION and shape.has_calls):
        return f"lost {lost} in {prompt!r}"
    is_sent = NOTHING.search(str([m.get("tool_calls") or "" for m in shape.messages]))
    if nothings(prompt) > nothings(full_prompt(name)) and not is_sent:
        return f"no content was printed: {prompt!r}"
    if shape_name in OTHERWISE:
        return None
    theirs = transformers_prompt(published, shape.messages)
    if theirs is not None and is_right(theirs, shape) and theirs != prompt:
        return f"transformers has {theirs!r}, we {prompt!r}"
    return None


def is_right(prompt: str, shape: c.Shape) -> bool:
    """Whether transformers' prompt for the messages as sent is what anybody would want."""
    has_all = all(word in prompt for word in shape.words)
    is_quoted = '\\"quirekey' in prompt or "{'quirekey" in prompt
    shows_form = re.search("""['"]type['"]: ['"]text""", prompt)
    return has_all and not is_quoted and not shows_form and not NOTHING.search(prompt)


# --- the facts themselves ---

FACTS = {
    "qwen2.5": {"developer": "developer_as_system"},
    "qwen3.5": {
        "lone instructions": "lone_instructions_as_user",
        "developer": "developer_as_system",
        "later instructions": "join_later_instructions",
        "first instructions": "join_first_instructions",
    },
    "llama-3.1": {"developer": "developer_as_system", "several calls": "one_call_each"},
    "mistral-small-3.2": {
        "developer": "developer_as_system",
        "later instructions": "join_later_instructions",
        "first instructions": "join_first_instructions",
        "user twice": "join_users",
        "assistant twice": "join_assistants",
        "turns": "one_answer_each",
        "ids": "short_ids",
    },
    "deepseek-v3": {"developer": "developer_as_system", "arguments": "text"},
    "r1-distill-qwen": {
        "developer": "developer_as_system",
        "later instructions": "join_later_instructions",
        "first instructions": "join_first_instructions",
        "text beside calls": "text_before_calls",
    },
    "gpt-oss": {
        "later instructions": "join_later_instructions",
        "first instructions": "join_first_instructions",
        "reasoning": "reasoning_with_text",
        "several calls": "one_call_each",
    },
    "gemma-2": {
        "developer": "developer_as_system",
        "first instructions": "instructions_into_user",
        "calls": "calls_as_text",
        "results": "results_as_user",
        "user twice": "join_users",
        "assistant twice": "join_assistants",
    },
    "functiongemma": {},
}


@pytest.mark.parametrize("name", FACTS)
def test_no_more_is_rewritten_than_needed(name: str) -> None:
    assert TEMPLATES[name].facts.describe() == FACTS[name]


def test_forms_of_no_content() -> None:
    """As sent where that is taken. Null breaks some templates; others show calls only beside null."""
    silent = {name: dict(TEMPLATES[name].facts.silent) for name in BY_NAME}
    kept = {"string": "string", "null": "null", "absent": "absent"}
    assert silent["qwen2.5"] == silent["kimi-k2"] == kept
    assert silent["glm-4.6"] == silent["minimax-m2"] == {**kept, "null": "string"}
    assert silent["qwen3"] == silent["qwq"] == {**kept, "null": "string", "absent": "string"}
    assert silent["r1-distill-qwen"] == {**kept, "string": "null", "absent": "null"}
    assert TEMPLATES["ministral-3"].facts.rewrites["silence"] is rewrites.drop_silent


def test_forms_of_content_by_role() -> None:
    assert TEMPLATES["qwen3"].facts.support("tool") == ContentSupport(strings=True, parts=False)
    mistral = TEMPLATES["mistral-small-3.2"].facts
    assert mistral.support("assistant") == ContentSupport(strings=True, parts=True)
    assert mistral.support("tool") == ContentSupport(strings=True, parts=False)
    assert TEMPLATES["parts-only"].facts.support("user") == ContentSupport(
        strings=False, parts=True
    )


def test_no_tools_are_a_list_where_null_fails() -> None:
    """jinja2 does not iterate null; minijinja does."""
    source = "{% for t in tools %}{% endfor %}{{ messages[0].content.rsplit('.', 1)[0] }}"
    assert ChatTemplate(source).facts.no_tools == []
    assert ChatTemplate(source).render([c.user("a.b")]) == "a"
    assert TEMPLATES["qwen3"].facts.no_tools is None


def test_what_renders_nothing_is_left_alone() -> None:
    facts = ChatTemplate("{{ 'x' }}").facts
    assert not facts.complete
    assert facts.write([Turn("user", ["a"]), Turn("developer", ["b"])]) == [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b"},
    ]


def test_asking_does_not_load_jinja2() -> None:
    """It takes fifty times as long as the whole of asking."""
    assert [name for name in BY_NAME if TEMPLATES[name]._fallback] == ["kimi-k2-queue"]


# --- arguments ---

TEXTS = ['{"quirekey": "quirevalue"}', '{"quirekey":"quirevalue"}', '{"a": ', "{'a': 1}", "null", "[]",
         '""', "", "words"]  # fmt: skip


def called(name: str, arguments: object) -> str:
    message = c.assistant(None, tool_calls=[c.call(arguments)])
    return TEMPLATES[name].render([c.user(), message, c.result()])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["deepseek-v3", "r1-distill-llama", "functionary-3.2"])
def test_arguments_as_sent_where_they_are_text(name: str, text: str) -> None:
    whole = called(name, c.OBJECT)
    assert called(name, text) == whole.replace(json.dumps(c.OBJECT), text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"a": 1, "b": [1, 2', {"a": 1, "b": [1, 2]}),
        ('{"a": "tw', {"a": "tw"}),
        ('{"value": ', {}),
        ('{"a": 1}}', {"a": 1}),
        ("{'a': 1}", {}),
        ("null", {}),
        ("[1]", {}),
        ('"x"', {}),
        ("", {}),
        (None, {}),
        ('{"a": NaN, "b": ', {}),
        ('{"a": "\\ud800"}', {}),
    ],
)
@pytest.mark.parametrize("name", ["qwen3-coder", "glm-4.6", "minimax-m2", "qwen3.5"])
def test_arguments_as_far_as_they_go_where_they_are_an_object(
    name: str, text: str | None, read: dict[str, object]
) -> None:
    assert called(name, text) == called(name, read)


@pytest.mark.parametrize("text", ["{'a': 1}", "[1]", "words"])
def test_text_that_is_no_object_is_shown_where_the_template_takes_text_too(text: str) -> None:
    assert text in called("qwen3", text)


# --- single rewrites, whose result a word in a prompt does not prove ---


def test_results_stand_behind_their_own_calls() -> None:
    """Results come in any order; ids say which is whose."""
    shape = c.SHAPES["results swapped"]
    turns = rewrites.one_call_each(read_turns(shape.messages))
    assert [(t.role, t.texts, len(t.calls)) for t in turns] == [
        ("user", ["quireuser"], 0),
        ("assistant", [], 1),
        ("tool", ["quireresult"], 0),
        ("assistant", [], 1),
        ("tool", ["quireother"], 0),
    ]


@pytest.mark.parametrize("own", ["c1", "0", "", "call_1"])
def test_ids_that_are_too_short(own: str) -> None:
    """Mistral's templates in vLLM take the last nine characters, and refuse less."""
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length < 9 %}"
        "{{ raise_exception('ids have 9 characters') }}{% endif %}{{ c.id[-9:] ~ c.function.name ~ "
        "(c.function.arguments | tojson) }}{% endfor %}{% if m.role == 'tool' %}{% if "
        "m.tool_call_id | length < 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        "{{ m.tool_call_id[-9:] }}{% endif %}{{ m.content or '' }}{% endfor %}"
    )
    turns = [c.user(), c.assistant(None, tool_calls=[c.call(own=own)]), c.result(own=own)]
    text = ChatTemplate(source).render(turns)
    first, second = text.split("quirefunction")
    assert first[-9:] in second


def test_short_ids_are_the_same_in_every_request() -> None:
    def ids() -> list[object]:
        turns = rewrites.short_ids(read_turns(c.SHAPES["long ids"].messages))
        return [turns[1].calls[0]["id"], turns[2].fields["tool_call_id"]]  # type: ignore[index,call-overload]

    assert ids() == ids()
    assert len(set(ids())) == 1
    assert re.fullmatch("[a-zA-Z0-9]{9}", str(ids()[0]))


def test_a_prompt_stays_the_same_as_the_conversation_grows() -> None:
    """Or the prefix cache would not find it: what is rewritten does not depend on what follows."""
    for name in BY_NAME:
        messages = list(c.SHAPES["answered"].messages)
        before = TEMPLATES[name].render(messages[:3], add_generation_prompt=False)
        after = TEMPLATES[name].render(messages, add_generation_prompt=False)
        if name not in ("qwen3", "qwen3.5", "mistral-nemo"):  # these write the last turn otherwise
            assert after.startswith(before.removesuffix("\n")), name


def test_a_developer_is_known_where_the_template_says_so() -> None:
    knows = (
        "{% for m in messages %}{% if m.role == 'developer' %}D:{% else %}{{ m.role }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate(knows).render([c.system(role="developer")]) == "D:quiresystem"
    prints = "{% for m in messages %}{{ m.role | upper }}:{{ m.content }}{% endfor %}"
    assert ChatTemplate(prints).render([c.system(role="developer")]) == "SYSTEM:quiresystem"


def test_another_template_for_tools() -> None:
    both = ChatTemplate(
        "plain {{ messages[0].content }}", tool_source="tools {{ messages[0].content }}"
    )
    assert both.render([c.user("x")]) == "plain x"
    assert both.render([c.user("x")], tools=[{"type": "function"}]) == "tools x"
    assert both.source.startswith("tools")


def test_an_older_name_of_a_role() -> None:
    prints = ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    assert "tool:x" in prints.render([c.user(), {"role": "function", "name": "f", "content": "x"}])


def test_thoughts_in_parts() -> None:
    prints = ChatTemplate("{{ messages[0].content }}|{{ messages[0].reasoning_content }}")
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]
    assert prints.render([{"role": "assistant", "content": thought}]) == "yes|hm"


# --- any conversation ---


class Words:
    """Each text once, so that a prompt shows which is missing."""

    def __init__(self) -> None:
        self.needed: list[str] = []
        self._count = 0

    def next(self, *, needed: bool = True) -> str:
        self._count += 1
        word = f"quire{chr(97 + self._count // 26 % 26)}{chr(97 + self._count % 26)}x"
        if needed:
            self.needed.append(word)
        return word


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[c.Message], list[str]]:
    """Messages in the orders that clients send, the user first, and the words that must be shown."""
    words = Words()
    contents = st.sampled_from(["string", "parts", "two parts"])
    silent: list[object] = [None, "", [], [{"type": "text", "text": ""}]]

    def content(*, needed: bool = True) -> object:
        form = draw(contents)
        texts = [words.next(needed=needed) for _ in range(2 if form == "two parts" else 1)]
        return texts[0] if form == "string" else c.parts(*texts)

    def instruct() -> list[c.Message]:
        return [c.system(content(), draw(st.sampled_from(["system", "developer"])))]

    def calls() -> list[c.Message]:
        ids = [f"call_{words.next(needed=False)}" for _ in range(draw(st.integers(1, 3)))]
        made = [c.call(json.dumps({"k": words.next()}), name=words.next(), own=own) for own in ids]
        says = draw(st.sampled_from(["nothing", "text", "absent"]))
        message: c.Message = {"role": "assistant", "tool_calls": made}
        if says == "text":
            message["content"] = content(needed=False)
        elif says == "nothing":
            message["content"] = draw(st.sampled_from(silent))
        if draw(st.booleans()):
            message["reasoning_content"] = words.next(needed=False)
        results = [c.result(content(), own=own) for own in ids]
        return [message, *draw(st.permutations(results))]

    def say(*, before_calls: bool = False) -> list[c.Message]:
        if draw(st.integers(0, 4)):
            return [c.assistant(content(needed=not before_calls))]
        return [c.assistant(draw(st.sampled_from(silent)), reasoning_content="thought")]

    def ask() -> list[c.Message]:
        return [c.user(content())]

    messages = [*(instruct() if draw(st.booleans()) else []), *ask()]
    kinds = ["ask", "say", "say", "calls", "calls", "instruct"]
    steps = draw(st.lists(st.sampled_from(kinds), max_size=6))
    for index, step in enumerate(steps):
        following = [other for other in steps[index + 1 :] if other != "instruct"]
        if step == "say":  # beside calls, some templates leave it out
            messages += say(before_calls=following[:1] in (["say"], ["calls"]))
        else:
            messages += {"ask": ask, "calls": calls, "instruct": instruct}[step]()
    return messages, words.needed


@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in NO_NOTATION])
def test_nothing_is_lost(name: str, conversation: tuple[list[c.Message], list[str]]) -> None:
    messages, words = conversation
    if name == "mistral-nemo":  # it shows its system message where the user has the last word
        messages = [*messages, c.user()]
    note(json.dumps(messages))
    prompt = TEMPLATES[name].render(messages)
    note(prompt)
    assert [word for word in words if word not in prompt] == []


# --- calls as older clients and other formats write them ---

FLAT = {"name": "quirefunction", "arguments": c.TEXT}


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3", "mistral-nemo", "glm-4.6", "chatml"])
@pytest.mark.parametrize(
    "fields",
    [
        {"function_call": FLAT},
        {"function_call": FLAT, "tool_calls": None},
        {"function_call": FLAT, "tool_calls": []},
        {"tool_calls": [FLAT]},
        {"tool_calls": [{"id": c.ID, "type": "function", **FLAT}]},
        {"tool_calls": [{"id": c.ID, "type": "function", "function": None, **FLAT}]},
    ],
)
def test_calls_without_the_usual_wrapper(name: str, fields: dict[str, object]) -> None:
    usual = [c.user(), c.assistant(None, tool_calls=[c.call()]), c.result(), c.LATER_USER]
    sent = [c.user(), c.assistant(None, **fields), c.result(), c.LATER_USER]
    found = [TEMPLATES[name].render(turns) for turns in (sent, usual)]
    assert found[0].replace("call00000", c.ID) == found[1]


@pytest.mark.parametrize("name", ["mistral-nemo", "mistral-small-3.2", "qwen3"])
def test_calls_that_were_never_answered(name: str) -> None:
    """The user speaks before the result is there."""
    calls = [c.call(own="callquire"), c.call(name="quireother", own="callother")]
    turns = [c.user(), c.assistant(None, tool_calls=calls), c.LATER_USER]
    text = TEMPLATES[name].render(turns)
    assert [word for word in ("quireuser", "quireother", "quireagain") if word not in text] == []


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("name", ["gemma-2", "llama-2", "mistral-nemo", "qwen3.5", "qwen3"])
def test_instructions_alone(name: str, role: str) -> None:
    text = TEMPLATES[name].render([c.system(role=role)])
    assert "quiresystem" in text
    both = TEMPLATES[name].render([c.system(role=role), c.system("quirelater")])
    assert "quiresystem" in both
    assert "quirelater" in both


def test_a_custom_call() -> None:
    custom = {"id": c.ID, "type": "custom", "custom": {"name": "quirefunction", "input": "x y"}}
    turns = [c.user(), c.assistant(None, tool_calls=[custom]), c.result()]
    assert '"arguments": {"input": "x y"}' in TEMPLATES["qwen2.5"].render(turns)


@pytest.mark.parametrize(
    "call", [None, "f()", {}, {"function": None}, {"function": {"arguments": "{}"}}, {"name": 5}]
)
def test_what_is_no_call_is_named(call: object) -> None:
    turns = [c.user(), c.assistant(None, tool_calls=[c.call(), call]), c.result()]
    with pytest.raises(InvalidParameterError, match=r"messages\[1\]\.tool_calls\[1\]"):
        TEMPLATES["qwen2.5"].render(turns)


@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": "quireanswer"}])
def test_a_refusal_is_what_was_said(fields: dict[str, object]) -> None:
    turns = [c.user(), {"role": "assistant", "refusal": "quirerefusal", **fields}, c.LATER_USER]
    text = TEMPLATES["qwen3"].render(turns)
    assert ("quirerefusal" in text) == (fields.get("content") is None)

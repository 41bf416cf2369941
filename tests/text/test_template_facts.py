"""Every shape of conversation with every behaviour of a published template.

A prompt must show all that was said, print nothing for no content, and be transformers' prompt where
transformers takes the conversation as it was sent. The same table over HTTP:
`tests/server/test_conversations.py`.
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

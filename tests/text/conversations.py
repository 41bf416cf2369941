"""Conversations as clients send them, in every shape, and what a prompt must show of each.

Words that begin with `quire` stand for what was said; a prompt that does not show one of them lost it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, object]

OBJECT = {"quirekey": "quirevalue"}
TEXT = '{"quirekey": "quirevalue"}'
ID = "callquire"


def call(
    arguments: object = TEXT, *, name: str = "quirefunction", own: str | None = ID
) -> dict[str, object]:
    made: dict[str, object] = {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return made if own is None else {"id": own, **made}


def user(content: object = "quireuser") -> Message:
    return {"role": "user", "content": content}


def assistant(content: object = "quireanswer", **fields: object) -> Message:
    return {"role": "assistant", "content": content, **fields}


def system(content: object = "quiresystem", role: str = "system") -> Message:
    return {"role": role, "content": content}


def result(content: object = "quireresult", *, own: str | None = ID, **fields: object) -> Message:
    ids: Message = {} if own is None else {"tool_call_id": own}
    return {"role": "tool", "content": content, **ids, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@dataclass(frozen=True)
class Shape:
    """messages: as sent. optional: words that a template may leave out, as its author decided."""

    messages: Sequence[Message]
    optional: frozenset[str] = frozenset()

    @property
    def words(self) -> list[str]:
        found = re.findall(r"quire[a-z]+\d?", str(self.messages))
        return [word for word in dict.fromkeys(found) if word not in self.optional]

    @property
    def has_calls(self) -> bool:
        return any(m.get("tool_calls") or m["role"] == "tool" for m in self.messages)


BESIDE_CALLS = frozenset({"quireanswer", "quirethought"})
LATER_USER = user("quireagain")
ABSENT: Message = {"role": "assistant", "tool_calls": [call()]}


def loop(message: Message, *after: Message, **shape: object) -> Shape:
    return Shape([user(), message, *(after or [result()])], **shape)  # type: ignore[arg-type]


def arguments(value: object) -> Shape:
    """A call whose arguments are no object: the conversation goes on, whatever is shown of them."""
    return loop(assistant(None, tool_calls=[call(value)]))


SHAPES: dict[str, Shape] = {
    # no tools
    "user": Shape([user()]),
    "system": Shape([system(), user()]),
    "turns": Shape([system(), user(), assistant(), LATER_USER]),
    "parts": Shape(
        [system(parts("quiresystem")), user(parts("quireuser", "quiretwo")),
         assistant(parts("quireanswer")), LATER_USER]
    ),
    "reasoning": Shape(
        [user(), assistant(reasoning_content="quirethought"), LATER_USER],
        frozenset({"quirethought"}),
    ),
    "reasoning, no content": Shape(
        [user(), assistant(None, reasoning_content="quirethought"), LATER_USER],
        frozenset({"quirethought"}),
    ),
    "assistant null": Shape([user(), assistant(None), LATER_USER]),
    "assistant absent": Shape([user(), {"role": "assistant"}, LATER_USER]),
    "assistant empty": Shape([user(), assistant(""), LATER_USER]),
    "assistant no parts": Shape([user(), assistant([]), LATER_USER]),
    "dumped fields": Shape(
        [user(), assistant(tool_calls=None, refusal=None, function_call=None), LATER_USER]
    ),
    "empty calls": Shape([user(), assistant(tool_calls=[]), LATER_USER]),
    # roles and order
    "developer": Shape([system(role="developer"), user()]),
    "system, developer": Shape([system(), system("quirelater", "developer"), user()]),
    "two systems": Shape([system(), system("quirelater"), user()]),
    "system later": Shape([system(), user(), assistant(), system("quirelater"), LATER_USER]),
    "developer later": Shape([user(), assistant(), system("quirelater", "developer"), LATER_USER]),
    "system last": Shape([user(), assistant(), LATER_USER, system("quirelater")]),
    "user twice": Shape([user(), LATER_USER]),
    "assistant twice": Shape([user(), assistant(), assistant("quiremore"), LATER_USER]),
    # the tool loop
    "null": loop(assistant(None, tool_calls=[call()])),
    "absent": loop(ABSENT),
    "empty": loop(assistant("", tool_calls=[call()])),
    "no parts": loop(assistant([], tool_calls=[call()])),
    "empty part": loop(assistant(parts(""), tool_calls=[call()])),
    "object": loop(assistant(None, tool_calls=[call(OBJECT)])),
    "text beside": loop(assistant(tool_calls=[call()]), optional=BESIDE_CALLS),
    "parts beside": loop(
        assistant(parts("quireanswer"), tool_calls=[call()]), optional=BESIDE_CALLS
    ),
    "reasoning beside": loop(
        assistant(None, tool_calls=[call()], reasoning_content="quirethought"),
        optional=BESIDE_CALLS,
    ),
    "all beside": loop(
        assistant(tool_calls=[call()], reasoning="quirethought", reasoning_content="quirethought"),
        optional=BESIDE_CALLS,
    ),
    "text, then call": Shape(
        [user(), assistant(), assistant(None, tool_calls=[call()]), result(), assistant("quiremore"),
         LATER_USER],
        BESIDE_CALLS,
    ),
    "call, then text": Shape(
        [user(), assistant(None, tool_calls=[call()]), assistant(), result()], BESIDE_CALLS
    ),
    "call, then nothing": loop(assistant(None, tool_calls=[call()]), assistant(""), result()),
    "answered": loop(
        assistant(None, tool_calls=[call()]), result(), assistant("quiremore"), LATER_USER
    ),
    "interrupted": loop(assistant(None, tool_calls=[call()]), result(), LATER_USER),
    "two rounds": loop(
        assistant(None, tool_calls=[call()]), result(),
        assistant(None, tool_calls=[call(name="quiresecond", own="callother")]),
        result("quireother", own="callother"), assistant("quiremore"), LATER_USER,
    ),
    "two calls": loop(
        assistant(None, tool_calls=[call(), call(name="quiresecond", own="callother")]),
        result(), result("quireother", own="callother"), assistant("quiremore"), LATER_USER,
    ),
    "two calls apart": loop(
        assistant(None, tool_calls=[call()]),
        assistant(None, tool_calls=[call(name="quiresecond", own="callother")]),
        result(), result("quireother", own="callother"),
    ),
    "results swapped": loop(
        assistant(None, tool_calls=[call(), call(name="quiresecond", own="callother")]),
        result("quireother", own="callother"), result(),
    ),
    "long ids": loop(
        assistant(None, tool_calls=[call(own="call_0123456789abcdef0123")]),
        result(own="call_0123456789abcdef0123"),
    ),
    "no ids": loop(assistant(None, tool_calls=[call(own=None)]), result(own=None)),
    "result's name": loop(assistant(None, tool_calls=[call()]), result(name="quirefunction")),
    "result in parts": loop(
        assistant(None, tool_calls=[call()]), result(parts("quireresult", "quiretwo"))
    ),
    "result empty": loop(assistant(None, tool_calls=[call()]), result("")),
    "system and tools": Shape(
        [system(), user(), assistant(None, tool_calls=[call()]), result(), assistant("quiremore"),
         LATER_USER]
    ),
    # arguments that are no object
    "arguments {}": arguments("{}"),
    "arguments cut": arguments('{"value": '),
    "arguments cut in a string": arguments('{"quirekey": "quireval'),
    "arguments of Python": arguments("{'a': 1}"),
    "arguments null": arguments("null"),
    "arguments None": arguments(None),
    "arguments a list": arguments("[]"),
    "arguments a string": arguments('""'),
    "arguments empty": arguments(""),
    "arguments words": arguments("no JSON at all"),
}  # fmt: skip

CUT = "arguments cut in a string"
SHAPES[CUT] = Shape(SHAPES[CUT].messages, frozenset({"quirekey", "quireval"}))

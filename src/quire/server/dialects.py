"""Shared code of /v1/responses and /v1/messages, which are translated to chat completions.

Their requests become a `ChatCompletionRequest`, which is checked and served as any other. Errors are
translated back, so that they name the client's own fields. Their answers are pieces, one after the other
(reasoning, text, a call), where a chat completion has one message with three fields.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from quire.errors import RequestError
from quire.outputs import CompletionOutput
from quire.server.body import Body, parse
from quire.server.errors import ApiError, bad_request, malformed, to_api_error
from quire.server.requests import ChatCompletionRequest, DecodingFields
from quire.server.tools import AnswerReader
from quire.text.parsing import (
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
    merged,
)

Kind = Literal["reasoning", "text", "call"]
INSTRUCTIONS = ("system", "developer")


def to_chat(request: DecodingFields, fields: Mapping[str, object]) -> ChatCompletionRequest:
    """A chat completion with the decoding fields of `request`, and `fields`."""
    shared = {name: getattr(request, name) for name in DecodingFields.model_fields}
    given = {name: value for name, value in (shared | dict(fields)).items() if value is not None}
    return parse(ChatCompletionRequest, Body(given)).request


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the fields in errors of a chat completion to the client's fields, by `names`."""
    try:
        yield
    except (ApiError, RequestError) as error:
        answer = to_api_error(error, "")
        prefix, path = "", answer.param or ""
        if path.startswith("body."):
            prefix, path = "body.", path.removeprefix("body.")
        head = path.partition(".")[0]
        if head not in names:
            raise
        message = answer.message
        if message.startswith(head):
            message = names[head] + message[len(head) :]
        raise ApiError(
            answer.status,
            message,
            param=prefix + names[head],
            kind=answer.kind,
            headers=answer.headers,
        ) from None


def wrong(where: str, rule: str) -> ApiError:
    """where: the path into the body, as "input[3].content"."""
    return malformed(f"{where} {rule}.", param=f"body.{where.partition('[')[0]}")


def as_object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise wrong(where, "must be an object")
    return value


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, "must be a string")
    return value


def texts(content: object, where: str, kinds: Mapping[str, str]) -> list[str]:
    """The texts of a content, which is a string or parts. kinds: type of a part -> the field of its text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise wrong(where, "must be a string or a list of parts")
    return [text_of(part, f"{where}[{index}]", kinds) for index, part in enumerate(content)]


def text_of(part: object, where: str, kinds: Mapping[str, str]) -> str:
    given = as_object(part, where)
    kind = as_text(given.get("type"), f"{where}.type")
    if kind not in kinds:
        raise bad_request(
            f"{where} has type {kind[:40]!r}, which is not supported; text is.",
            param=where.partition("[")[0],
        )
    return as_text(given.get(kinds[kind]), f"{where}.{kinds[kind]}")


class Turns:
    """Builds the messages of a chat completion from smaller items.

    Reasoning, text and calls of the assistant in a row become one message, and so do the instructions at the
    beginning. Rewriting for the template is done later, for all endpoints (`text/template_facts.py`).
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, object]] = []

    def say(self, role: str, said: list[str]) -> None:
        if role == "assistant":
            answer = self._answer()
            if "content" in answer or "tool_calls" in answer:
                answer = self._add("assistant")
            answer["content"] = "".join(said)
        elif role in INSTRUCTIONS and [m["role"] for m in self.messages] in (
            ["system"],
            ["developer"],
        ):
            before = self.messages[0]
            before["content"] = "\n\n".join([str(before["content"]), *said])
        elif role == "user" and len(said) != 1:
            self._add(role)["content"] = [{"type": "text", "text": text} for text in said]
        else:
            self._add(role)["content"] = "\n".join(said)

    def think(self, text: str) -> None:
        answer = self._answer()
        if answer.keys() & {"content", "tool_calls", "reasoning_content"}:
            answer = self._add("assistant")
        answer["reasoning_content"] = text

    def call(self, call_id: object, name: object, arguments: object) -> None:
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        calls = self._answer().setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append(call)

    def result(self, call_id: object, said: list[str]) -> None:
        message = self._add("tool")
        message["tool_call_id"] = call_id
        message["content"] = "\n".join(said)

    def _answer(self) -> dict[str, object]:
        """The assistant's current message."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return self._add("assistant")

    def _add(self, role: str) -> dict[str, object]:
        self.messages.append({"role": role})
        return self.messages[-1]


@dataclass(slots=True)
class Piece:
    """A part of an answer: reasoning, text or one call."""

    kind: Kind
    index: int
    id: str
    """A random id."""
    name: str = ""
    """The function's name, for a call."""
    call_id: str = ""
    deltas: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far; for a call, its arguments."""
        return "".join(self.deltas)


@dataclass(frozen=True, slots=True)
class Opened:
    piece: Piece


@dataclass(frozen=True, slots=True)
class Extended:
    piece: Piece
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    piece: Piece
    by_end: bool
    """Whether the piece ended only because the output ended."""


Change = Opened | Extended | Closed


class Pieces:
    """The pieces of one answer. Only the last one can be open."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._is_open = False
        self.all: list[Piece] = []

    def read(self, part: CompletionOutput) -> Iterator[Change]:
        """The changes that an output makes, one at a time; each has its piece in the state after that
        change. An empty answer is one empty text."""
        for event in merged(self._reader.events(part)):
            if isinstance(event, ToolCallEnd):
                yield from self.close()
            elif isinstance(event, ToolCallStart):
                yield from self._open("call", event.name)
            else:
                kind = _kind(event)
                if not self._is_open or self.all[-1].kind != kind:
                    yield from self._open(kind)
                self.all[-1].deltas.append(event.text)
                yield Extended(self.all[-1], event.text)
        if part.finished:
            if not self.all:
                yield from self._open("text")
            yield from self.close(by_end=True)

    def close(self, *, by_end: bool = False) -> Iterator[Change]:
        """Close the open piece, if there is one."""
        if self._is_open:
            self._is_open = False
            yield Closed(self.all[-1], by_end)

    def _open(self, kind: Kind, name: str = "") -> Iterator[Change]:
        yield from self.close()
        call_id = self._reader.call_id() if kind == "call" else ""
        self.all.append(Piece(kind, len(self.all), secrets.token_hex(16), name, call_id))
        self._is_open = True
        yield Opened(self.all[-1])


def _kind(event: object) -> Kind:
    if isinstance(event, TextDelta):
        return "text"
    return "reasoning" if isinstance(event, ReasoningDelta) else "call"

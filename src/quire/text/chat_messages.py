"""Chat messages as requests send them, read into turns.

Clients say the same thing in many ways: content as a string or as parts, no content as null, "", [] or an
absent key, call arguments as JSON text or as an object, several names for reasoning, fields that are
null. A `Turn` holds the content and the form in which it was sent. `template_facts.py` writes turns in
the form that a model's template takes. Only plain JSON data is accepted, and it is copied: a template
must never see an object with methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.errors import InvalidParameterError

Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Form = Literal["string", "parts", "null", "absent"]

MAX_DEPTH = 64
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
REASONING_PARTS = {"thinking": "thinking", "reasoning": "text"}
ROLE_NAMES = {"function": "tool"}
"""Older name of a role -> its name."""
CALL_FIELDS = ("name", "arguments")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning field: clients and templates each use one of them (Qwen3, gpt-oss, Solar)."""


@dataclass(slots=True)
class Turn:
    """One message.

    texts: its text; one string, or several if it was sent as parts. Empty if it has no content.
    form: how the content was sent.
    calls: its tool calls as sent; empty for other roles than the assistant's.
    fields: its other keys (`name`, `tool_call_id`, ...), without those that are null.
    """

    role: str
    texts: list[str] = field(default_factory=list)
    form: Form = "string"
    calls: list[Json] = field(default_factory=list)
    reasoning: str | None = None
    fields: dict[str, Json] = field(default_factory=dict)

    @property
    def has_text(self) -> bool:
        return any(self.texts)

    def add_text(self, texts: list[str], form: Form) -> None:
        """Append `texts`, after a blank line."""
        if not any(texts):
            return
        if not self.has_text:
            self.texts, self.form = texts, form
        elif "parts" in (self.form, form):
            self.texts, self.form = [*self.texts, *texts], "parts"
        else:
            self.texts = ["\n\n".join([*self.texts, *texts])]

    def add(self, other: Turn) -> None:
        """Append the text, reasoning and calls of `other`, the message that follows."""
        self.add_text(other.texts, other.form)
        self.calls = [*self.calls, *other.calls]
        thoughts = [text for text in (self.reasoning, other.reasoning) if text is not None]
        self.reasoning = "\n\n".join(thoughts) if thoughts else None


def read_turns(messages: object) -> list[Turn]:
    """The messages of a request as turns; the caller's data is not changed.

    Raises `InvalidParameterError(param="messages")` for a message that is not an object or has no role,
    content that is not text, types that JSON does not have, nesting deeper than 64, lone surrogates.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        got = (
            "an empty one"
            if isinstance(messages, Sequence) and not messages
            else type(messages).__name__
        )
        raise InvalidParameterError(
            'messages must be a non-empty list of {"role": ..., "content": ...} objects, '
            f"got {got}.",
            param="messages",
        )
    return [_read(message, f"messages[{index}]") for index, message in enumerate(messages)]


def plain_json(value: object, *, param: str, depth: int = 0) -> Json:
    """A copy of `value` made of built-in JSON types only.

    Raises `InvalidParameterError` for other types, nesting deeper than 64, lone surrogates.
    """
    if depth > MAX_DEPTH:
        raise InvalidParameterError(
            f"{param} is nested deeper than {MAX_DEPTH} levels.", param=param
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value, param)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {
            _plain_text(str(key), param): plain_json(item, param=param, depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain_json(item, param=param, depth=depth + 1) for item in value]
    raise InvalidParameterError(
        f"{param} must be JSON data; {type(value).__name__} is not.", param=param
    )


def _plain_text(text: str, param: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidParameterError(
                f"{param} holds text that is not valid Unicode (a lone surrogate).", param=param
            ) from error
    return str(text)


def _read(message: object, where: str) -> Turn:
    plain = plain_json(message, param="messages")
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
        raise InvalidParameterError(
            f"{where} must be an object with a string `role`.", param="messages"
        )
    role = str(plain.pop("role"))
    turn = Turn(ROLE_NAMES.get(role, role), form="null" if "content" in plain else "absent")
    content = plain.pop("content", None)
    turn.calls = _read_calls(plain.pop("tool_calls", None), plain.pop("function_call", None), where)
    refusal = plain.pop("refusal", None)
    if content is None and isinstance(refusal, str):
        content = refusal
    turn.fields = {key: value for key, value in plain.items() if value is not None}
    for name in REASONING_FIELDS:
        value = turn.fields.pop(name, None)
        if turn.reasoning is None and isinstance(value, str):
            turn.reasoning = value
    if content is not None:
        _read_content(turn, content, f"{where}.content")
    return turn


def _read_calls(calls: Json, older: Json, where: str) -> list[Json]:
    """calls: `tool_calls`. older: `function_call`, OpenAI's field before there were tools."""
    if calls is not None and not isinstance(calls, list):
        raise InvalidParameterError(f"{where}.tool_calls must be a list.", param="messages")
    if calls:
        read = [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    else:
        read = [] if older is None else [_read_call({"function": older}, f"{where}.function_call")]
    for index, call in enumerate(read):
        _check_depth(call, f"{where}.tool_calls[{index}].function.arguments")
    return read


def _read_call(call: Json, where: str) -> Json:
    """The call with a `function`: some clients send `custom` instead, or put its fields into the call."""
    if isinstance(call, dict) and isinstance(call.get("name"), str) and not call.get("function"):
        fields = {key: value for key, value in call.items() if key not in CALL_FIELDS}
        call = fields | {"function": {key: call[key] for key in CALL_FIELDS if key in call}}
    custom = call.get("custom") if isinstance(call, dict) else None
    if isinstance(call, dict) and isinstance(custom, dict) and not call.get("function"):
        fields = {key: value for key, value in call.items() if key != "custom"}
        arguments: Json = {"input": custom.get("input")}
        call = fields | {
            "type": "function",
            "function": {"name": custom.get("name"), "arguments": arguments},
        }
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidParameterError(
            f"{where} must have a `function` with a `name`; send the call as it was answered.",
            param="messages",
        )
    return call


def _check_depth(call: Json, where: str) -> None:
    """The limit on nesting holds for arguments sent as text too."""
    function = call.get("function") if isinstance(call, dict) else None
    text = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(text, str) or text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    try:
        plain_json(json.loads(text), param=where)
    except ValueError:
        return  # not JSON
    except (RecursionError, InvalidParameterError) as error:
        raise InvalidParameterError(
            f"{where} is nested deeper than {MAX_DEPTH} levels.", param="messages"
        ) from error


def _read_content(turn: Turn, content: Json, where: str) -> None:
    if isinstance(content, str):
        turn.texts, turn.form = [content], "string"
        return
    if not isinstance(content, list):
        raise InvalidParameterError(
            f"{where} must be a string, null or a list of parts.", param="messages"
        )
    turn.form = "parts" if content else "string"
    thoughts: list[str] = []
    for index, part in enumerate(content):
        kind, text = _read_part(part, f"{where}[{index}]")
        (thoughts if kind in REASONING_PARTS else turn.texts).append(text)
    if thoughts and turn.reasoning is None:
        turn.reasoning = "\n\n".join(thoughts)


def _read_part(part: Json, where: str) -> tuple[str, str]:
    """The type of a content part, and its text."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidParameterError(f"{where} must be an object with a `type`.", param="messages")
    name = (TEXT_PARTS | REASONING_PARTS).get(kind)
    if name is None:
        raise InvalidParameterError(
            f"{where} has type {kind[:40]!r}; this model takes text parts only.", param="messages"
        )
    text = part.get(name)
    if not isinstance(text, str):
        raise InvalidParameterError(f"{where}.{name} must be a string.", param="messages")
    return kind, text

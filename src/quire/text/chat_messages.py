"""Chat messages as requests send them, made into what chat templates expect.

Clients speak the OpenAI dialect, templates the Hugging Face one. The differences, each mended here once so
that no endpoint has to: content as parts or as a string, tool-call arguments as JSON text or as an object,
fields that are present but null, several names for reasoning. Only plain JSON data gets through, rebuilt:
a template must never see an object with methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.errors import InvalidParameterError

Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

MAX_DEPTH = 64
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ContentSupport:
    """Which forms of message content a template renders properly."""

    strings: bool
    parts: bool


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


def normalize_messages(
    messages: Sequence[Mapping[str, object]], support: ContentSupport
) -> list[dict[str, Json]]:
    """The messages as the template wants them; the caller's are left alone.

    Content: strings stay where the template takes strings, and are wrapped in a text part where it
    takes only parts; lists stay where it takes parts, and are joined with newlines where it does
    not. No content is None beside tool calls and "" otherwise.
    Null fields and empty `tool_calls` are dropped (clients dump whole models), tool-call arguments
    are parsed, `reasoning_content` is filled from its other names.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidParameterError("messages must be a non-empty list.", param="messages")
    return [_normalize(message, index, support) for index, message in enumerate(messages)]


def _normalize(message: object, index: int, support: ContentSupport) -> dict[str, Json]:
    where = f"messages[{index}]"
    plain = plain_json(message, param="messages")
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
        raise InvalidParameterError(
            f"{where} must be an object with a string `role`.", param="messages"
        )
    content = plain.pop("content", None)
    result: dict[str, Json] = {key: value for key, value in plain.items() if value is not None}
    if not result.get("tool_calls"):
        result.pop("tool_calls", None)
    has_calls = "tool_calls" in result
    if has_calls:
        result["tool_calls"] = _parsed_tool_calls(result["tool_calls"], where)
    result["content"] = _content(content, support, where=where, has_calls=has_calls)
    return _with_reasoning(result)


def _content(content: Json, support: ContentSupport, *, where: str, has_calls: bool) -> Json:
    if content is None:
        if has_calls:
            return None
        content = ""
    if isinstance(content, str):
        if support.strings or not support.parts:
            return content
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidParameterError(
            f"{where}.content must be a string, null or a list of parts.", param="messages"
        )
    texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    if support.parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _part_text(part: Json, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidParameterError(f"{where} must be an object with a `type`.", param="messages")
    if kind not in TEXT_PARTS:
        raise InvalidParameterError(
            f"{where} has type {kind[:40]!r}; this model takes text parts only.", param="messages"
        )
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidParameterError(
            f"{where}.{TEXT_PARTS[kind]} must be a string.", param="messages"
        )
    return text


def _parsed_tool_calls(calls: Json, where: str) -> list[Json]:
    """`function.arguments` as an object: OpenAI sends JSON text, templates apply `tojson` to it."""
    if not isinstance(calls, list):
        raise InvalidParameterError(f"{where}.tool_calls must be a list.", param="messages")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            path = f"{where}.tool_calls[{index}].function.arguments"
            function["arguments"] = _parsed_arguments(str(function["arguments"]), path)
    return calls


def _parsed_arguments(text: str, where: str) -> Json:
    try:
        parsed = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(
            f"{where} must be JSON text, as the model's own tool calls are.", param="messages"
        ) from error
    return plain_json(parsed, param="messages")


def _with_reasoning(message: dict[str, Json]) -> dict[str, Json]:
    """Templates read `reasoning_content`, or `thinking` (gpt-oss); clients send any of three."""
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}

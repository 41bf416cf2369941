"""The arguments of tool calls in a conversation's history, in the form that a template takes.

OpenAI's API sends JSON text. Most templates apply `tojson` to an object, some concatenate text. The
arguments of a call that was cut off at max_tokens, or that a model wrote badly, are not valid JSON: the
conversation must still render.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from quire.errors import InvalidParameterError
from quire.text.chat_messages import Json, plain_json


@dataclass(frozen=True, slots=True)
class ArgumentsForm:
    """form: what the template renders correctly. raw: whether it also prints invalid JSON text unchanged."""

    form: Literal["object", "text"] = "object"
    raw: bool = False

    def write(self, arguments: Json) -> Json:
        """arguments: as sent. An object, its JSON text, text that is not JSON, or None.

        A template that takes text gets the text as sent. One that takes objects gets an object: what was
        complete of JSON that was cut off, and {} for other text, unless the template prints text unchanged.
        """
        if self.form == "text":
            return arguments if isinstance(arguments, str) else arguments_text(arguments)
        if not isinstance(arguments, str):
            return arguments if isinstance(arguments, dict) else {}
        parsed = parse_arguments(arguments)
        if parsed is not None:
            return parsed
        return arguments if self.raw and arguments.strip() not in ("", "null") else {}


def parse_arguments(text: str) -> dict[str, Json] | None:
    """The JSON object in `text`, which may be cut off; None if `text` is not the beginning of one."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = _parse_beginning(text)
    if not isinstance(parsed, dict):
        return None
    try:
        plain = plain_json(parsed, param="messages")
    except InvalidParameterError:  # too deep, or a lone surrogate in an escape
        return None
    assert isinstance(plain, dict)
    return plain


def _parse_beginning(text: str) -> object:
    from pydantic_core import from_json

    try:
        return from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError:
        return None


def arguments_text(arguments: Json) -> str:
    """JSON text for arguments that were sent as an object."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


def function_of(call: Json) -> dict[str, Json] | None:
    """The `function` of a call; None if it has none."""
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else None

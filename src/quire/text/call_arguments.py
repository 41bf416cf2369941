"""The arguments of tool calls in a conversation's history, in the form that a template takes.

OpenAI's API has JSON text, most templates apply `tojson` to an object, some concatenate text. A call that was
cut off at max_tokens, or that a model wrote badly, holds text that is no JSON. It must not end the
conversation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from quire.errors import InvalidParameterError
from quire.text.chat_messages import Json, plain_json


@dataclass(frozen=True, slots=True)
class ArgumentsForm:
    """form: what the template renders properly. raw: whether it also prints text that is no JSON as it is."""

    form: Literal["object", "text"] = "object"
    raw: bool = False

    def write(self, arguments: Json) -> Json:
        """arguments: as sent. An object, its JSON text, text that is no JSON, or None.

        A template that takes text gets the text as sent. One that takes objects gets an object: of text
        that was cut off, as far as it goes; of other text {}, unless the template prints text as it is.
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
    """The object that `text` is, or begins; None where it is neither."""
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
    """The JSON text of arguments that came as an object."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


def function_of(call: Json) -> dict[str, Json] | None:
    """The `function` of a call, or None for what is no call of one."""
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else None

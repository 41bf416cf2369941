"""From the bytes of a request to a checked model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from quire.server.errors import ApiError, bad_request, malformed
from quire.server.live import ClientGoneError
from quire.server.middleware import adopt_request_id
from quire.server.neutral import Neutral, asks_for_nothing
from quire.server.requests import PROMPT_FORMS
from quire.server.unsupported import IDLE, NO_EFFECT, UNREAD, refuse_unsupported

M = TypeVar("M", bound=BaseModel)

BODY_TIMEOUT = 60.0
"""Seconds within which a client must send its body."""
MAX_WARNINGS = 16
MAX_NAME_CHARS = 64


class Body(dict[str, object]):
    """A request's JSON object. Routes take fields through its methods, so all follow --strict-requests."""

    strict = False


@dataclass(frozen=True, slots=True)
class Parsed(Generic[M]):
    request: M
    warnings: list[str]
    """One sentence for each field that is unknown or has no effect."""


async def read_json(request: Request) -> Body:
    """The body as a JSON object without nulls.

    A null field is dropped, so it means the same as an absent one. The parser is strict: UTF-8 only, no NaN
    or Infinity, no lone surrogates, nesting at most 200.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(
            415, "Send the body as JSON, with the header Content-Type: application/json."
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            raw = await request.body()
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT:.0f} seconds.") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    if not raw:
        raise malformed("The body is empty; it must be a JSON object.", param="body")
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(f"The body is not valid JSON: {error}.", param="body") from None
    if not isinstance(value, dict):
        raise malformed("The body must be a JSON object.", param="body")
    body = Body({name: item for name, item in value.items() if item is not None})
    body.strict = request.app.state.strict_requests
    adopt_request_id(request.scope, body.get("request_id"))
    return body


def parse(
    model: type[M],
    body: Mapping[str, object],
    *,
    unsupported: Mapping[str, Neutral] | None = None,
) -> Parsed[M]:
    """`body` as `model`, without fields that have a neutral value (see `neutral`). Raises a 400
    `ApiError` that names the first wrong field."""
    declared = model.model_fields.keys()
    refused = {name: value for name, value in (unsupported or {}).items() if name not in declared}
    others = IDLE | refused
    asked = {
        name: value
        for name, value in body.items()
        if not asks_for_nothing(model, others, name, value)
    }
    refuse_unsupported(asked, refused)
    known = (declared | refused.keys() | NO_EFFECT) - UNREAD
    warnings = warn_of(body, [ignored(name) for name in asked if name not in known])
    try:
        request = model.model_validate(asked)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _explain(details[0], model) from None
    return Parsed(request, warnings)


def warn_of(body: Mapping[str, object], idle: Sequence[tuple[str, str]]) -> list[str]:
    """Add warnings for fields without effect, given as (field, reason). With --strict-requests, raise a
    400 for the first."""
    if idle and isinstance(body, Body) and body.strict:
        name, complaint = idle[0]
        raise bad_request(
            f"{complaint}, which this server refuses (--strict-requests). Leave it out.",
            param=printable(name),
        )
    shown = [complaint for _, complaint in idle[:MAX_WARNINGS]]
    if len(idle) > MAX_WARNINGS:
        shown.append(f"{len(idle) - MAX_WARNINGS} more unknown fields were ignored")
    return shown


def ignored(name: str) -> tuple[str, str]:
    """An unknown field, for `warn_of`."""
    if name in UNREAD:
        return name, f"field {name} has no effect"
    return name, f"unknown field {printable(name)} was ignored"


def printable(name: str) -> str:
    """Text that is safe in a header and a log: ASCII without control characters, separators or quotes."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name)[
        :MAX_NAME_CHARS
    ]


def _is_prompt(model: type[BaseModel], name: str) -> bool:
    return model.model_fields[name].description == PROMPT_FORMS


_UNION_TAGS = ("str", "list", "int", "constrained", "dict")


def _explain(error: ErrorDetails, model: type[BaseModel]) -> ApiError:
    """In vLLM's form: `param` is the path below "body", without the branches of unions."""
    location = error["loc"]
    name = str(location[0]) if location else ""
    if name in model.model_fields and error["type"] != "missing" and _is_prompt(model, name):
        return malformed(
            f"{name} must be a string, a list of strings, a list of token ids (0 or more), or a list "
            "of lists of token ids.",
            param=f"body.{name}",
        )
    parts = [
        printable(str(part)) for part in location
        if not (isinstance(part, str) and part.partition("[")[0] in _UNION_TAGS)
    ]  # fmt: skip
    path = ".".join(["body", *parts])
    return malformed(f"{'.'.join(parts) or 'body'}: {error['msg']}.", param=path)

"""OpenAI's `response_format`, translated to `structured_outputs`."""

from __future__ import annotations

from typing import Any

from quire.errors import InvalidParameterError
from quire.sampling_params import StructuredOutputsParams

TYPES = ("text", "json_object", "json_schema", "structural_tag")
SCHEMA_FIELDS = ("name", "schema", "strict", "description")
MAX_NAME = 64


def parse(response_format: dict[str, Any]) -> StructuredOutputsParams | None:
    """The grammar that the output must match; None for plain text.

    A schema is enforced whether or not it says `strict`. Raises `InvalidParameterError` naming the part
    of `response_format` at fault.
    """
    kind = response_format.get("type")
    if kind not in TYPES:
        raise _error("type", f"must be one of {', '.join(TYPES)}", kind)
    allowed = {
        "json_schema": ("json_schema",),
        "structural_tag": ("structural_tag", "structures", "triggers", "format"),
    }.get(kind, ())
    for name in response_format:
        if name not in ("type", *allowed):
            raise _error(name, f"does not belong to the type {kind}", response_format[name])
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "json_schema":
        return StructuredOutputsParams(json=_schema(response_format.get("json_schema")))
    # Either the tag itself, as in vLLM, or an object with the tag as a field.
    tag = response_format.get("structural_tag", response_format)
    if not isinstance(tag, (dict, str)) or not tag:
        raise _error("structural_tag", "must be an object", tag)
    return StructuredOutputsParams(structural_tag=tag)


def _schema(json_schema: object) -> dict[str, Any]:
    if not isinstance(json_schema, dict):
        raise _error("json_schema", "must be an object with name and schema", json_schema)
    for name in json_schema:
        if name not in SCHEMA_FIELDS:
            raise _error(f"json_schema.{name}", "is not a field of it", json_schema[name])
    title = json_schema.get("name")
    if not isinstance(title, str) or not 0 < len(title) <= MAX_NAME:
        raise _error("json_schema.name", f"must be a text of 1 to {MAX_NAME} characters", title)
    if not isinstance(json_schema.get("strict"), (bool, type(None))):
        raise _error("json_schema.strict", "must be true or false", json_schema["strict"])
    schema = json_schema.get("schema")
    if not isinstance(schema, dict):
        raise _error("json_schema.schema", "must be a JSON schema", schema)
    return schema


def _error(name: str, rule: str, value: object) -> InvalidParameterError:
    param = f"response_format.{name}"
    return InvalidParameterError(f"{param} {rule}.", param=param, value=value)

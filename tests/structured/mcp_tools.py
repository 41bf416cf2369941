"""Tools as MCP servers publish them: zod's and pydantic's schemas, most of whose bytes are descriptions."""

from __future__ import annotations

import random
from typing import Any

TEXT = (
    "Use this where the user asks for it by name. Prefer narrow filters, never guess identifiers, and ask "
    "for one page at a time. "
)
DRAFTS = ["http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"]
DEFS = {
    "Filter": {
        "type": "object", "title": "Filter", "description": TEXT,
        "properties": {
            "field": {"type": "string"},
            "op": {"type": "string", "enum": ["eq", "ne", "lt", "gt"]},
            "value": {},
            "and": {"type": "array", "items": {"$ref": "#/$defs/Filter"}},
        },
        "required": ["field", "op"],
    },
    "Text": {
        "type": "object",
        "properties": {"type": {"const": "text", "type": "string"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
    "Image": {
        "type": "object",
        "properties": {
            "type": {"const": "image", "type": "string"},
            "data": {"type": "string", "contentEncoding": "base64"},
        },
        "required": ["type", "data"],
    },
}  # fmt: skip
PROPERTIES: dict[str, Any] = {
    "owner": {"type": "string", "title": "Owner", "description": TEXT * 2},
    "id": {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1, "description": TEXT},
    "state": {"type": "string", "enum": ["open", "closed", "all"], "default": "open"},
    "per_page": {"type": "number", "minimum": 1, "maximum": 100, "description": TEXT},
    "since": {"type": "string", "format": "date-time", "description": TEXT},
    "labels": {"type": "array", "items": {"type": "string"}, "description": TEXT},
    "metadata": {
        "type": "object", "propertyNames": {"type": "string"},
        "additionalProperties": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "filter": {"anyOf": [{"$ref": "#/$defs/Filter"}, {"type": "null"}], "default": None},
    "content": {
        "oneOf": [{"$ref": "#/$defs/Text"}, {"$ref": "#/$defs/Image"}],
        "discriminator": {"propertyName": "type", "mapping": {"text": "#/$defs/Text"}},
    },
    "options": {
        "type": "object", "properties": {"force": {"type": "boolean"}, "depth": {"type": "integer"}},
        "required": ["force"], "additionalProperties": False,
    },
}  # fmt: skip


def mcp_tools(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    tools = []
    for index in range(count):
        names = rng.sample(list(PROPERTIES), rng.randrange(4, len(PROPERTIES) + 1))
        schema = {
            "$schema": rng.choice(DRAFTS),
            "type": "object",
            "properties": {name: PROPERTIES[name] for name in names},
            "required": names[:2],
            "additionalProperties": False,
            "$defs": DEFS,
        }
        function = {"name": f"tool_{index}", "description": TEXT * 5, "parameters": schema}
        tools.append({"type": "function", "function": function})
    return tools

"""Tools as requests send them, written in the way that a template takes.

In OpenAI's API and in MCP a function may lack `description` and `parameters`; some templates read both of
every function. Which rewrites a template needs is found out when it is loaded (`template_facts.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from quire.text.chat_messages import Json

ToolRewrite = Callable[[Json], Json]
"""One tool -> the tool in the form that the template takes. The caller's data is not changed."""


def fill_function(tool: Json) -> Json:
    """Add a missing description, parameters, and properties of these (gpt-oss, Hermes, Seed-OSS)."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    function = {key: value for key, value in tool["function"].items() if value is not None}  # type: ignore[union-attr]
    parameters = function.get("parameters")
    given = parameters if isinstance(parameters, dict) else {}
    given = {key: value for key, value in given.items() if value is not None}
    filled = {"type": "object", "properties": {}, **given}
    return {**tool, "function": {"description": "", **function, "parameters": filled}}


def split_types(tool: Json) -> Json:
    """Write `type: [a, b]` as `anyOf` (Hermes)."""

    def split(schema: dict[str, Json]) -> dict[str, Json]:
        types = schema.get("type")
        if not isinstance(types, list) or "anyOf" in schema:
            return schema
        rest = {key: value for key, value in schema.items() if key != "type"}
        return {**rest, "anyOf": [{"type": one} for one in types]}

    return _each_property(tool, split)


def describe_properties(tool: Json) -> Json:
    """Add missing descriptions of properties (Command R+)."""
    return _each_property(tool, lambda schema: {"description": "", **schema})


REWRITES: tuple[tuple[ToolRewrite, dict[str, Json]], ...] = (
    (fill_function, {}),
    (
        split_types,
        {"type": "object", "properties": {"a": {"type": ["string", "null"], "description": "b"}}},
    ),
    (describe_properties, {"type": "object", "properties": {"a": {"type": "string"}}}),
)
"""Each rewrite, and parameters that a template fails on if it needs the rewrite. {}: without a
description too."""


def probe_tool(parameters: dict[str, Json]) -> Json:
    described: dict[str, Json] = {"description": "c", "parameters": parameters}
    return {
        "type": "function",
        "function": {"name": "quirefunction", **(described if parameters else {})},
    }


def _each_property(tool: Json, change: Callable[[dict[str, Json]], dict[str, Json]]) -> Json:
    function = tool.get("function") if isinstance(tool, dict) else None
    parameters = function.get("parameters") if isinstance(function, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict) or not parameters:
        return tool
    return {**tool, "function": {**function, "parameters": _inside(parameters, change)}}


def _inside(schema: Json, change: Callable[[dict[str, Json]], dict[str, Json]]) -> Json:
    """`schema` with the schemas of its properties changed, and theirs."""
    if not isinstance(schema, dict):
        return schema
    changed = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        changed["properties"] = {
            name: change(inner) if isinstance(inner := _inside(part, change), dict) else inner
            for name, part in properties.items()
        }
    if isinstance(schema.get("items"), dict):
        changed["items"] = _inside(schema["items"], change)
    return changed

"""Tools of the Responses API as functions of a chat completion, and calls of those functions as items.

A custom tool takes text instead of arguments. It is offered to the model as a function with one string
argument, `input`, and a call of it is an item of type custom_tool_call. The members of a namespace are
offered as functions whose names begin with the namespace's. A call of one has separate `name` and
`namespace`, as Codex needs it. Tools of all other types (web_search, image_generation, local_shell, ...)
would run elsewhere, or need a model that was trained on them: they are left out with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from quire.server.body import printable
from quire.server.dialects import as_object, as_text, wrong
from quire.server.errors import ApiError, bad_request

Object = dict[str, object]

DEFAULT_NAMESPACE = "functions"
"""The namespace of Codex's own tools. Models know these without the namespace."""
INPUT = "input"
CUSTOM_PARAMETERS: Object = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
"""Other fields are about how a provider runs the call, and do not belong in the prompt."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool in the client's form."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(slots=True)
class ToolSet:
    """A request's tools."""

    functions: list[Object] = field(default_factory=list)
    """The tools in the form of a chat completion."""
    offers: dict[str, Offer] = field(default_factory=dict)
    """Name of the function -> the client's tool."""
    left_out: list[str] = field(default_factory=list)
    """Types of tools that are not served."""
    idle: list[tuple[str, str]] = field(default_factory=list)
    """Fields without effect, for `body.warn_of`."""

    @classmethod
    def read(cls, tools: Sequence[dict[str, Any]]) -> ToolSet:
        """Raises a 400 `ApiError` for anything that is not a tool."""
        found = cls()
        for index, tool in enumerate(tools):
            found._add(tool, f"tools[{index}]", None)
        for kind in dict.fromkeys(found.left_out):
            text = f"tools of type {printable(kind)} are not served and were left out"
            found.idle.append(("tools", text))
        return found

    def _add(self, tool: Mapping[str, Any], where: str, namespace: str | None) -> None:
        kind = as_text(tool.get("type"), f"{where}.type")
        if kind == "namespace" and namespace is None:
            inner = as_text(tool.get("name"), f"{where}.name")
            members = tool.get("tools") or []
            if not isinstance(members, list):
                raise wrong(f"{where}.tools", "must be a list")
            for index, member in enumerate(members):
                path = f"{where}.tools[{index}]"
                self._add(as_object(member, path), path, inner)
        elif kind == "function":
            function = {name: tool[name] for name in FUNCTION_FIELDS if tool.get(name) is not None}
            self._offer(function, Offer(str(tool.get("name")), namespace))
        elif kind == "custom":
            name = as_text(tool.get("name"), f"{where}.name")
            function = {"name": name, "parameters": CUSTOM_PARAMETERS}
            description = self._description(tool, name)
            if description:
                function["description"] = description
            self._offer(function, Offer(name, namespace, custom=True))
        else:
            self.left_out.append(kind)

    def _offer(self, function: Object, offer: Offer) -> None:
        """Add a tool. A function whose name is not text is refused later, as for all endpoints."""
        if isinstance(function.get("name"), str):
            name = function_name(offer.name, offer.namespace)
            function["name"] = name
            self.offers[name] = offer
        self.functions.append({"type": "function", "function": function})

    def _description(self, tool: Mapping[str, Any], name: str) -> str:
        """The description, with the grammar of the text: models that were trained on such tools need to
        see it."""
        description, form = tool.get("description") or "", tool.get("format") or {}
        if not isinstance(form, dict) or form.get("type", "text") == "text":
            return str(description)
        text = f"the format of custom tool {printable(name)} is shown to the model and not enforced"
        self.idle.append(("tools", text))
        grammar = (
            f"{INPUT} must match this {form.get('syntax') or ''} grammar:\n{form.get('definition')}"
        )
        return f"{description}\n\n{grammar}".strip()

    def choice(self, asked: object) -> object:
        """`tool_choice` in the form of a chat completion. Raises a 400 `ApiError` if it needs a tool that
        is not served."""
        if asked == "required" and not self.functions and self.left_out:
            raise self._not_served(self.left_out[0])
        if not isinstance(asked, dict):
            return asked
        kind = asked.get("type")
        if kind == "allowed_tools":
            entries = asked.get("tools")
            listed = entries if isinstance(entries, list) else []
            served = [entry for entry in listed if _type(entry) in ("function", "custom")]
            if listed and not served:
                raise self._not_served(str(_type(listed[0])))
            allowed = {"mode": asked.get("mode", "auto"), "tools": [_named(e) for e in served]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        if kind in ("function", "custom"):
            return _named(asked)
        if isinstance(kind, str):
            raise self._not_served(kind)
        return asked

    def _not_served(self, kind: str) -> ApiError:
        return bad_request(
            f"tool_choice needs a tool of type {kind[:40]!r}, which is not served. Functions and custom "
            "tools are.",
            param="tool_choice",
        )


def function_name(name: str, namespace: str | None) -> str:
    if namespace is None or namespace == DEFAULT_NAMESPACE:
        return name
    return f"{namespace.removesuffix('__')}__{name}"


def custom_input(arguments: str) -> str | None:
    """The text for a custom tool, as far as `arguments` are complete; None if there is none yet."""
    try:
        value = from_json(arguments, allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return None
    text = value.get(INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def _type(entry: object) -> object:
    return entry.get("type") if isinstance(entry, dict) else None


def _named(entry: Mapping[str, Any]) -> Object:
    name, namespace = entry.get("name"), entry.get("namespace")
    if isinstance(name, str) and (namespace is None or isinstance(namespace, str)):
        name = function_name(name, namespace)
    return {"type": "function", "function": {"name": name}}

"""Translates the messages and tools of /v1/messages to a chat completion, block by block.

Blocks and tools that only Anthropic's servers can serve are left out with a warning: a client that
changes to this server in the middle of a conversation still sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.server.billing_header import without_headers
from quire.server.body import printable
from quire.server.dialects import Turns, as_object, as_text, text_of, texts, wrong
from quire.server.errors import bad_request

Object = dict[str, object]

TEXT_BLOCKS = {"text": "text", "tool_reference": "tool_name"}
"""Type of a block -> the field of its text."""
ROLES = ("user", "assistant", "system")
SEALED = frozenset({"redacted_thinking", "fallback"})
"""Blocks of an assistant without readable text."""
LEFT_OUT = frozenset({"server_tool_use", "container_upload", "mcp_tool_listing"})
LEFT_OUT_SUFFIX = "_tool_result"
"""Suffix of the types of blocks with results of Anthropic's own tools: web_search_tool_result, ..."""
CALLS = ("tool_use", "mcp_tool_use")
RESULTS = ("tool_result", "mcp_tool_result")
FUNCTION_TOOLS = (None, "custom")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def add_system(turns: Turns, system: str | list[dict[str, Any]] | None) -> None:
    said = without_headers(texts(system or [], "system", TEXT_BLOCKS))
    if said:
        turns.say("system", said)


def add_messages(turns: Turns, messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Add `messages` to `turns`. Returns what was left out, for `body.warn_of`."""
    left_out: list[str] = []
    for index, message in enumerate(messages):
        left_out += _add_message(turns, message, f"messages[{index}]")
    return [
        ("messages", f"blocks of type {printable(kind)} are not served and were left out")
        for kind in dict.fromkeys(left_out)
    ]


def _add_message(turns: Turns, message: dict[str, Any], where: str) -> list[str]:
    """Returns the types of blocks that were left out."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise wrong(f"{where}.role", "must be user, assistant or system")
    if isinstance(content, str):
        turns.say(role, [content])
        return []
    if not isinstance(content, list):
        raise wrong(f"{where}.content", "must be a string or a list of blocks")
    said: list[str] = []
    left_out = []

    def speak() -> None:
        """Add the texts so far as a message."""
        if said:
            turns.say(role, said.copy())
            said.clear()

    for index, given in enumerate(content):
        path = f"{where}.content[{index}]"
        block = as_object(given, path)
        kind = as_text(block.get("type"), f"{path}.type")
        if role == "assistant" and kind == "thinking":
            speak()
            turns.think(as_text(block.get("thinking"), f"{path}.thinking"))
        elif role == "assistant" and kind in CALLS:
            speak()
            call_id, name = (as_text(block.get(n), f"{path}.{n}") for n in ("id", "name"))
            turns.call(call_id, name, as_object(block.get("input") or {}, f"{path}.input"))
        elif kind in RESULTS and (role == "user" or kind != "tool_result"):
            speak()
            call = as_text(block.get("tool_use_id"), f"{path}.tool_use_id")
            turns.result(call, _result(block, path))
        elif kind in LEFT_OUT or kind.endswith(LEFT_OUT_SUFFIX):
            left_out.append(kind)
        elif role != "assistant" or kind not in SEALED:
            said += _texts(block, path)
    speak()
    return left_out


def _result(block: Object, where: str) -> list[str]:
    """A tool's result. An error without text gets one, so that it differs from an empty result."""
    content, path = block.get("content") or "", f"{where}.content"
    if isinstance(content, list):
        said = [
            text
            for index, part in enumerate(content)
            for text in _texts(as_object(part, f"{path}[{index}]"), f"{path}[{index}]")
        ]
    else:
        said = texts(content, path, TEXT_BLOCKS)
    return ["Error"] if block.get("is_error") is True and not any(said) else said


def _texts(block: Object, where: str) -> list[str]:
    """The texts of a block."""
    kind = block.get("type")
    if kind == "compaction":
        return [as_text(block.get("content") or "", f"{where}.content")]
    if kind == "search_result":
        head = [as_text(block.get(name) or "", f"{where}.{name}") for name in ("title", "source")]
        return [*head, *texts(block.get("content"), f"{where}.content", TEXT_BLOCKS)]
    source = block.get("source")
    if (
        kind == "document"
        and isinstance(source, dict)
        and source.get("type") in ("text", "content")
    ):
        field = "data" if source["type"] == "text" else "content"
        title = [as_text(block["title"], f"{where}.title")] if block.get("title") else []
        return [*title, *texts(source.get(field), f"{where}.source.{field}", TEXT_BLOCKS)]
    return [text_of(block, where, TEXT_BLOCKS)]


class ToolSet:
    """A request's tools, in the form of a chat completion."""

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """Raises a 400 `ApiError` for anything that is not a tool."""
        self.functions: list[Object] = []
        self._left_out: dict[str, str] = {}
        """Name of a tool -> its type."""
        for index, tool in enumerate(tools):
            kind = tool.get("type")
            if kind in FUNCTION_TOOLS:
                self.functions.append(_function(tool, f"tools[{index}]"))
            else:
                name = str(tool.get("name"))
                self._left_out[name] = as_text(kind, f"tools[{index}].type")

    @property
    def idle(self) -> list[tuple[str, str]]:
        """The tools that were left out, for `body.warn_of`."""
        return [
            ("tools", f"tools of type {printable(kind)} are not served and were left out")
            for kind in dict.fromkeys(self._left_out.values())
        ]

    def choice(self, choice: dict[str, Any]) -> Object:
        """Fields of a chat completion. Raises a 400 `ApiError` if it needs a tool that was left out."""
        kind = choice.get("type", "auto")
        one_at_most = choice.get("disable_parallel_tool_use") is True
        several: Object = {"parallel_tool_calls": False} if one_at_most else {}
        left_out = list(self._left_out.values())
        if kind == "any" and not self.functions and left_out:
            raise _not_served(left_out[0])
        if kind == "tool":
            name = as_text(choice.get("name"), "tool_choice.name")
            if name in self._left_out:
                raise _not_served(self._left_out[name])
            return several | {"tool_choice": {"type": "function", "function": {"name": name}}}
        if not isinstance(kind, str) or kind not in CHOICES:
            raise bad_request(
                "tool_choice.type must be auto, any, tool or none.", param="tool_choice"
            )
        return several | ({"tool_choice": CHOICES[kind]} if choice else {})


def _not_served(kind: str) -> Exception:
    return bad_request(
        f"tool_choice needs a tool of type {kind[:40]!r}, which is not served. Tools with a name and an "
        "input_schema are.",
        param="tool_choice",
    )


def _function(tool: dict[str, Any], where: str) -> Object:
    function = {name: tool.get(name) for name in ("name", "description", "strict")}
    function["parameters"] = as_object(tool.get("input_schema"), f"{where}.input_schema")
    return {"type": "function", "function": function}

"""Translates the input of /v1/responses to messages of a chat completion, item by item.

Clients send back all items that they have received, from any server. Calls and their results stay in the
conversation, also those of shells, of patches and of MCP servers: as calls of a function with that name.
Items that only the server that made them can read, or that belong to tools which are not served, are left
out with a warning.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from quire.server.dialects import Turns, as_object, as_text, texts, wrong
from quire.server.errors import bad_request
from quire.server.response_store import Item, ResponseStore
from quire.server.responses_tools import INPUT, function_name

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
REASONING_PARTS = {"reasoning_text": "text", "summary_text": "text"}
ACTIONS = {
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
}
"""Type of a call -> its tool, and the field of its arguments."""
OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output"}) | {
    f"{kind}_output" for kind in ACTIONS
}
LEFT_OUT = frozenset(
    {
        "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
        "computer_call", "computer_call_output", "mcp_list_tools", "mcp_approval_request",
        "mcp_approval_response", "tool_search_call", "tool_search_output", "additional_tools",
        "compaction", "compaction_summary", "compaction_trigger", "context_compaction",
        "configuration_update", "program", "program_output", "ghost_snapshot",
    }
)  # fmt: skip


def read_input(
    given: str | list[dict[str, Any]], store: ResponseStore, owner: bytes | None
) -> list[Item]:
    """The input as items. References are replaced by the stored items, and each item gets an id, for listing.

    Raises a 404 `ApiError` for a reference to an item that is not stored.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    wanted = {
        as_text(item.get("id"), f"input[{index}].id")
        for index, item in enumerate(items)
        if _is_reference(item)
    }
    stored = store.find_items(wanted, owner) if wanted else {}
    return [
        stored[item["id"]] if _is_reference(item)
        else item | {"id": item.get("id") or f"item_{secrets.token_hex(16)}"}
        for item in items
    ]  # fmt: skip


def _is_reference(item: Mapping[str, object]) -> bool:
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and "role" not in item)


def add_items(turns: Turns, items: Sequence[Item], *, start: int = 0) -> list[tuple[str, str]]:
    """Add `items` to `turns`. start: the index of the first one in `input`. Returns what was left out, for
    `body.warn_of`."""
    left_out = [
        kind
        for index, item in enumerate(items, start=start)
        if (kind := _add_item(turns, item, f"input[{index}]"))
    ]
    return [
        ("input", f"items of type {kind} are not served and were left out")
        for kind in dict.fromkeys(left_out)
    ]


def _add_item(turns: Turns, item: Item, where: str) -> str | None:
    """Returns the kind of the item if it was left out."""
    given = item.get("type") or ("message" if "role" in item else "")
    kind = as_text(given, f"{where}.type")
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        turns.say(role, texts(item.get("content"), f"{where}.content", TEXT_PARTS))
    elif kind == "reasoning":
        part = "content" if item.get("content") else "summary"
        thoughts = texts(item.get(part) or [], f"{where}.{part}", REASONING_PARTS)
        if thoughts:
            turns.think("\n".join(thoughts))
        elif item.get("encrypted_content"):
            return "reasoning with encrypted_content alone"
    elif kind in ("function_call", "custom_tool_call") or kind in ACTIONS:
        turns.call(_call_id(item, where), *_call(item, kind, where))
    elif kind in OUTPUTS:
        turns.result(_call_id(item, where), _output(item, f"{where}.output"))
    elif kind == "mcp_call":
        call_id = as_text(item.get("id"), f"{where}.id")
        turns.call(call_id, *_call(item, "function_call", where))
        turns.result(call_id, [str(item.get("output") or item.get("error") or "")])
    elif kind in LEFT_OUT:
        return kind
    else:
        raise bad_request(f"{where} has type {kind[:40]!r}, which is not supported.", param="input")
    return None


def _call_id(item: Item, where: str) -> str:
    """The call's id. An output of local_shell has it in `id`."""
    if item.get("type") == "local_shell_call_output" and "call_id" not in item:
        return as_text(item.get("id"), f"{where}.id")
    return as_text(item.get("call_id"), f"{where}.call_id")


def _call(item: Item, kind: str, where: str) -> tuple[str, object]:
    """Name and arguments."""
    if kind in ACTIONS:
        name, field = ACTIONS[kind]
        action = as_object(item.get(field), f"{where}.{field}")
        kept = {key: value for key, value in action.items() if value is not None}
        if kind == "local_shell_call":
            kept.pop("type", None)
        return name, kept
    namespace = item.get("namespace")
    name = function_name(
        as_text(item.get("name"), f"{where}.name"),
        None if namespace is None else as_text(namespace, f"{where}.namespace"),
    )
    if kind == "custom_tool_call":
        return name, {INPUT: as_text(item.get("input"), f"{where}.input")}
    return name, as_text(item.get("arguments") or "", f"{where}.arguments")


def _output(item: Item, where: str) -> list[str]:
    output = item.get("output")
    if output is None:
        return [""]
    if item.get("type") != "shell_call_output" or isinstance(output, str):
        return texts(output, where, TEXT_PARTS)
    if not isinstance(output, list):
        raise wrong(where, "must be a list")
    said = []
    for index, part in enumerate(output):
        chunk = as_object(part, f"{where}[{index}]")
        outcome = as_object(chunk.get("outcome") or {}, f"{where}[{index}].outcome")
        said += [str(chunk[name]) for name in ("stdout", "stderr") if chunk.get(name)]
        if "exit_code" in outcome:
            said.append(f"exit code {outcome['exit_code']}")
        elif "type" in outcome:
            said.append(str(outcome["type"]))
    return said

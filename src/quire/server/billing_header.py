"""Removes the line with which Claude Code begins its system prompt, for the provider's billing:

    x-anthropic-billing-header: cc_version=2.1.100.7b4; cc_entrypoint=cli; cch=eb6c6;

It has no meaning for a model, and `cch` differs in every request: with this line at the beginning, almost
nothing of the prompt would be found in the prefix cache. Gateways pass it on in the system message of a
chat completion, so it is removed there too. Text that only mentions the header is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAME = "x-anthropic-billing-header:"
_VALUE = r"[^\s;]+(?:;[ \t]*[^\s;]+)*;?"
"""Words with semicolons between them, so that a sentence does not match."""
_LINES = re.compile(rf"(?:{NAME}[ \t]*{_VALUE}[ \t]*(?:\r?\n|\Z))+(?:[ \t]*\r?\n)*")


def without_header(text: str) -> str:
    """`text` without header lines at its beginning, and without blank lines after them."""
    if not text.startswith(NAME):
        return text
    found = _LINES.match(text)
    return text[found.end() :] if found else text


def without_headers(texts: Sequence[str]) -> list[str]:
    """`texts` without header lines at their beginnings; texts that become empty are left out."""
    kept = ((text, without_header(text)) for text in texts)
    return [rest for text, rest in kept if rest or not text]


def without_header_messages(messages: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The messages of a chat completion, without the header in system messages."""
    kept = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            content = message.get("content")
            if isinstance(content, str):
                rest = without_headers([content])
                if not rest:
                    continue
                message = message | {"content": rest[0]}
            elif isinstance(content, list) and content:
                parts = _without_header_parts(content)
                if not parts:
                    continue
                message = message | {"content": parts}
        kept.append(message)
    return kept


def _without_header_parts(parts: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    kept = []
    for part in parts:
        text = part.get("text")
        if isinstance(text, str):
            rest = without_headers([text])
            if not rest:
                continue
            part = part | {"text": rest[0]}
        kept.append(part)
    return kept

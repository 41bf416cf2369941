"""What the router compares of prompts, before they are tokenized."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

WORD_BYTES = 4
"""About a token of English text, so that a router that counts tokens can count words."""
MAX_WORDS = 65_536
FIELDS = ("tools", "system", "instructions", "messages", "prompt", "input")
"""In the order in which templates write them: a conversation's next turn begins with its last one."""


def prompt_words(body: bytes) -> tuple[Sequence[int], str]:
    """The prompt in a request's `body`, as integers, and what else a cached prefix depends on: the model's
    name (adapters have their own) and the salt. No words if there is no prompt; the replica checks the body.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return (), ""
    prompt = b"".join(bytes(fields[name]) for name in FIELDS if name in fields)
    whole = min(len(prompt) // WORD_BYTES, MAX_WORDS) * WORD_BYTES
    salt = b"\0".join(bytes(fields.get(name, b"")) for name in ("model", "cache_salt"))
    return memoryview(prompt[:whole]).cast("I"), salt.decode(errors="replace")

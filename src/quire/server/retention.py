"""What a request says about how long its KV should stay in the cache: seconds, OpenAI's
prompt_cache_retention, and Anthropic's cache_control in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.placement import LONGEST_RETENTION, Retain
from quire.server.dialect_schemas import CountTokensRequest
from quire.server.engine_protocol import ServedModel
from quire.server.errors import bad_request
from quire.server.prompts import EncodedPrompt, Truncation, encode_text
from quire.server.requests import DecodingFields

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DEFAULT_TTL = "5m"
MOST_MARKS = 4
"""As at Anthropic."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a conversation. The prompt up to there should stay."""

    seconds: float
    after: str
    """The text before it."""
    is_end: bool = False
    """Nothing comes after it."""


def asked_retention(request: DecodingFields) -> tuple[Retain, ...]:
    """Of the whole request. in_memory has no effect: it is what happens anyway."""
    of_word = _duration(request.prompt_cache_retention or "")
    wishes = (request.retain_seconds, of_word)
    return tuple(Retain(min(each, LONGEST_RETENTION)) for each in wishes if each)


def marks_of(asked: CountTokensRequest) -> list[Mark]:
    """The places that have a cache_control, the last `MOST_MARKS`. Raises a 400 `ApiError` for a ttl that is
    no duration."""
    found: list[Mark] = []
    last = ""
    for tool in asked.tools or ():
        last = str(tool.get("description") or tool.get("name") or "")
        _mark(found, tool, last, "tools")
    contents: list[tuple[str, object]] = [("system", asked.system)]
    contents += [("messages", message.get("content")) for message in asked.messages]
    for where, content in contents:
        blocks = content if isinstance(content, list) else []
        for block in blocks:
            if isinstance(block, dict):
                last = _last_text(block) or last
                is_end = content is contents[-1][1] and block is blocks[-1]
                _mark(found, block, last, where, is_end=is_end)
        if isinstance(content, str):
            last = content
    _mark(found, {"cache_control": asked.cache_control}, "", "cache_control", is_end=True)
    return found[-MOST_MARKS:]


async def locate(
    marks: Sequence[Mark], prompt: EncodedPrompt, model: ServedModel
) -> tuple[Retain, ...]:
    """The tokens before each mark. A template may have changed a text, or put it elsewhere; then the mark
    counts as one at the place of the mark before it."""
    text, cursor = prompt.text or "", 0
    ends: dict[float, int] = {}
    for mark in marks:
        at = text.find(mark.after, cursor)
        cursor = len(text) if mark.is_end else at + len(mark.after) if at >= 0 else cursor
        ends[mark.seconds] = cursor
    found, reached = [], 0
    for seconds in sorted(ends, reverse=True):
        if ends[seconds] <= reached:
            continue  # a longer wish has it
        reached = ends[seconds]
        count = len(prompt.token_ids)
        if reached < len(text):
            ids = await encode_text(
                model.tokenizer, text[:reached], add_special_tokens=False, cut=Truncation()
            )
            count = min(count, len(ids))
        found.append(Retain(seconds, count))
    return tuple(found)


def created(retain: Iterable[Retain], num_cached: int) -> dict[float, int]:
    """How many tokens a request has added to the cache by its wishes: those that it did not find there. By
    seconds."""
    counts: dict[float, int] = {}
    known = num_cached
    for wish in sorted(retain, key=lambda wish: -wish.seconds):
        if wish.num_tokens is not None and wish.num_tokens > known:
            counts[wish.seconds] = wish.num_tokens - known
            known = wish.num_tokens
    return counts


def _mark(
    found: list[Mark], block: dict[str, Any], after: str, where: str, *, is_end: bool = False
) -> None:
    control = block.get("cache_control")
    if control is None:
        return
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise bad_request('cache_control must be an object whose type is "ephemeral".', param=where)
    seconds = _duration(control.get("ttl") or DEFAULT_TTL)
    if seconds is None:
        raise bad_request("cache_control.ttl must be a duration like 5m or 1h.", param=where)
    found.append(Mark(min(seconds, LONGEST_RETENTION), after.strip(), is_end))


def _last_text(block: dict[str, Any]) -> str:
    """Of a block with texts, perhaps in blocks of its own."""
    for name in ("text", "thinking", "content"):
        value = block.get(name)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            return _last_text(value[-1])
    return ""


def _duration(text: object) -> float | None:
    """Of "5m", in seconds."""
    match = re.fullmatch(r"([1-9]\d{0,6})([smhd])", text) if isinstance(text, str) else None
    return None if match is None else float(match[1]) * _UNITS[match[2]]

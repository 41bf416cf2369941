"""Reasoning and tool calls, read out of what models write."""

from __future__ import annotations

from quire.text.parsing.base import (
    Event,
    Parser,
    PlainParser,
    ReasoningDelta,
    TextDelta,
    ThinkingTokens,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    merged,
)

__all__ = [
    "Event",
    "Parser",
    "PlainParser",
    "ReasoningDelta",
    "TextDelta",
    "ThinkingTokens",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "merged",
]

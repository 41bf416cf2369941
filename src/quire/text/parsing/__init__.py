"""Reasoning and tool calls, read out of what models write.

base.py ──────── the events, and what a parser is
formats.py ───── which formats there are, and which one a model speaks
reader.py ────── text in pieces, read as if it were whole; json_scanner.py beneath it
calls.py, reasoning.py, harmony.py ── the grammars
forcing.py ───── the other direction: a grammar that makes a model call
"""

from __future__ import annotations

from quire.text.parsing.base import (
    Answer,
    Call,
    Event,
    Parser,
    PlainParser,
    ReasoningDelta,
    TextDelta,
    ThinkingTokens,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    gathered,
    merged,
)
from quire.text.parsing.formats import OutputFormat, output_format

__all__ = [
    "Answer",
    "Call",
    "Event",
    "OutputFormat",
    "Parser",
    "PlainParser",
    "ReasoningDelta",
    "TextDelta",
    "ThinkingTokens",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "gathered",
    "merged",
    "output_format",
]

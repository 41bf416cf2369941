"""Parsers that find reasoning and tool calls in the text of models.

base.py ──────── the events, and the protocol of a parser
formats.py ───── the formats, and which one a model uses
reader.py ────── reads text that comes in deltas; json_scanner.py beneath it
calls.py, reasoning.py, harmony.py ── the grammars
forcing.py ───── the other direction: a grammar that makes a model write calls
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

"""What a model said, taken apart: events, and what makes them out of text.

A model writes one text; clients want its answer, its reasoning and its tool calls apart. A parser reads the
text as it comes and says what is new as events. They know nothing of any endpoint's JSON: chat completions,
responses and messages are three ways of writing down the same ones.

For any way of cutting a text into deltas the events, joined, are those of the text pushed in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its name is complete. `index` counts the calls of one output from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: JSON text, an object once the call has ended."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


class Parser(Protocol):
    """Reads one output. Holds state: one for each choice of each request."""

    def push(self, delta: str, *, final: bool = False) -> list[Event]:
        """What `delta` adds. `final`: nothing follows, so nothing may be held back any longer."""


class PlainParser:
    """A model without any format: all text is the answer. The family's null member."""

    def push(self, delta: str, *, final: bool = False) -> list[Event]:
        return [TextDelta(delta)] if delta else []


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """Where a reasoning model's thinking part begins and ends, for rules that differ inside it."""

    start: list[int]
    end: list[int]
    inside: bool
    """Whether the prompt ends inside the thinking part."""


def merged(events: list[Event]) -> list[Event]:
    """The same, with neighbours of one kind joined: what a whole answer is made of."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, (TextDelta, ReasoningDelta)) and type(last) is type(event):
            assert isinstance(last, (TextDelta, ReasoningDelta))
            out[-1] = type(event)(last.text + event.text)
        elif (
            isinstance(event, ToolCallArguments)
            and isinstance(last, ToolCallArguments)
            and last.index == event.index
        ):
            out[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out

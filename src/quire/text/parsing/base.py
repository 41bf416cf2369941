"""The parts of a model's output as events, and the protocol of the parsers that make them.

A model writes one text; clients want its answer, its reasoning and its tool calls separately. A parser
reads the text as it comes and returns what is new as events. Events do not depend on an endpoint: chat
completions, responses and messages write the same events as different JSON.

However a text is cut into deltas, its events, joined, are those of the text pushed in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
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
        """The events that `delta` adds. `final`: no text follows, so no text may be held."""


class PlainParser:
    """For a model without a format: all text is the answer. The null member of the family."""

    def push(self, delta: str, *, final: bool = False) -> list[Event]:
        return [TextDelta(delta)] if delta else []


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """The tokens around a model's reasoning, for rules that differ inside it."""

    start: list[int]
    end: list[int]
    inside: bool
    """Whether the prompt ends inside the reasoning."""


@dataclass(slots=True)
class Call:
    """One call, as far as some events contain it. `name` is None if the call began before them."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    content: str
    reasoning: str
    calls: list[Call]


def gathered(events: Iterable[Event]) -> Answer:
    """Events joined by kind: text, reasoning, calls. The order between kinds is lost."""
    content, reasoning = list[str](), list[str]()
    calls: dict[int, Call] = {}
    for event in merged(events):
        if isinstance(event, TextDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls[event.index] = Call(event.index, event.name)
        elif isinstance(event, ToolCallArguments):
            calls.setdefault(event.index, Call(event.index)).arguments += event.text
    return Answer("".join(content), "".join(reasoning), list(calls.values()))


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, in which neighbours that continue each other are joined."""
    out: list[Event] = []
    for (kind, index), same in groupby(
        events, lambda event: (type(event), getattr(event, "index", 0))
    ):
        run = list(same)
        if kind is ToolCallStart or kind is ToolCallEnd:
            out += run
            continue
        text = "".join(getattr(event, "text", "") for event in run)
        if kind is ToolCallArguments:
            out.append(ToolCallArguments(index, text))
        else:
            out.append(TextDelta(text) if kind is TextDelta else ReasoningDelta(text))
    return out

"""Reads a text that comes in deltas, with the result of reading it as a whole.

A grammar is a generator over a `Reader`. It asks for the next character, a literal or a JSON value, and
yields where it needs text that has not come yet. Its decisions depend on the characters alone and never
on where deltas end, so every way of cutting the text gives the same events. It only reads forwards, and
unread text is never longer than a marker, so the time is linear in the length of any text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from quire.text.parsing.base import Event, merged
from quire.text.parsing.json_scanner import SPACE, JsonScanner

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a grammar: yields for more text, returns its result."""
Sink = Callable[[str], object]


PIECE = 4096
"""Characters searched at once: the most that a search for an absent marker costs."""


class Reader:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._final = False
        self._kept: list[str] | None = None

    def feed(self, text: str, *, final: bool) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0
        self._final = final

    @property
    def unread(self) -> int:
        return len(self._text) - self._at

    def take(self, count: int) -> str:
        """Read `count` characters, which must have come."""
        piece = self._text[self._at : self._at + count]
        self._at += count
        if self._kept is not None:
            self._kept.append(piece)
        return piece

    def keep(self, begun: str = "") -> None:
        """From here on keep the text that is read, after `begun`, in case it turns out to be plain text."""
        self._kept = [begun]

    def forget(self) -> str:
        """The text read since `keep`; "" if it has been taken already."""
        kept, self._kept = self._kept, None
        return "".join(kept or ())

    def peek(self) -> Steps[str]:
        """The next character, unread; "" at the end of the text."""
        while not self.unread and not self._final:
            yield
        return self._text[self._at : self._at + 1]

    def space(self, more: str = "") -> Steps[str]:
        """Skip whitespace, and the characters of `more`; the next character, unread."""
        while True:
            char = yield from self.peek()
            if not char or char not in SPACE + more:
                return char
            self.take(1)

    def literal(self, *options: str) -> Steps[str]:
        """Read the first of `options` with which the text continues; "" if it continues with none."""
        longest = max(map(len, options))
        while True:
            for option in options:
                if self._text.startswith(option, self._at):
                    return self.take(len(option))
            rest = self._text[self._at : self._at + longest]
            if self._final or not any(option.startswith(rest) for option in options):
                return ""
            yield

    def until(self, markers: Sequence[str], sink: Sink, *, limit: int | None = None) -> Steps[str]:
        """Read up to and past the first of `markers`; the text before it goes to `sink`.

        Returns the marker, or "" at the end of the text, or after `limit` characters without one.
        """
        while True:
            at, marker = _find(self._text, self._at, markers, final=self._final)
            if limit is not None:
                if at - self._at > limit:
                    at, marker = self._at + limit, ""
                limit -= at - self._at
            if at > self._at:
                sink(self.take(at - self._at))
            if marker:
                return self.take(len(marker))
            if self._final or limit == 0:
                return ""
            yield

    def back(self, count: int) -> None:
        """Make the end of the text that was just read unread."""
        self._at -= count
        if self._kept is not None:
            self._kept[-1] = self._kept[-1][:-count]

    def value(self, sink: Sink, *, limit: int | None = None) -> Steps[bool]:
        """Read a JSON value, which goes to `sink` as it comes. Returns whether it was valid and within
        `limit` characters."""
        scanner = JsonScanner()
        while not scanner.ended:
            yield from self.peek()
            if not self.unread or limit == 0:
                return False
            end = len(self._text) if limit is None else min(len(self._text), self._at + limit)
            text, end = scanner.scan(self._text, self._at, end)
            if limit is not None:
                limit -= end - self._at
            self.take(end - self._at)
            if text:
                sink(text)
            if scanner.failed:
                return False
        return True

    def string(self, limit: int) -> Steps[str | None]:
        """Read a JSON string; None if it is not one, longer than `limit`, or not valid Unicode."""
        if (yield from self.peek()) != '"':
            return None
        pieces: list[str] = []
        found = yield from self.value(pieces.append, limit=limit)
        return unquoted("".join(pieces)) if found else None


def unquoted(text: str) -> str | None:
    """The value of the JSON string `text`; None if it has lone surrogates, which no answer can contain."""
    said = str(json.loads(text))
    return None if any("\ud800" <= char <= "\udfff" for char in said) else said


def _find(text: str, start: int, markers: Sequence[str], *, final: bool) -> tuple[int, str]:
    """The position of the first of `markers`, and the marker; or "", and the position before which none
    can begin.

    If a marker that begins earlier, or at the same place and is longer, may still come, more text is
    needed: else the choice between overlapping markers would depend on how the text was cut.
    """
    at, marker = len(text), ""
    for candidate in markers:
        found = text.find(candidate, start, at + len(candidate))
        if 0 <= found < at or (found == at and len(candidate) > len(marker)):
            at, marker = found, candidate
    if not final:
        longest = max(map(len, markers)) - 1
        for begin in range(max(start, len(text) - longest), min(at + 1, len(text))):
            rest = text[begin:]
            if any(len(m) > len(rest) and m.startswith(rest) for m in markers):
                return begin, ""
    return at, marker


class ReadingParser:
    """A parser whose grammar is the generator `_read`, which appends to `_events`."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._events: list[Event] = []
        self._steps = self._read()

    def push(self, delta: str, *, final: bool = False) -> list[Event]:
        for start in range(0, len(delta) or 1, PIECE):
            end = start + PIECE
            self._reader.feed(delta[start:end], final=final and end >= len(delta))
            next(self._steps, None)
        events, self._events = self._events, []
        return merged(events)

    def _read(self) -> Steps[None]:
        raise NotImplementedError


class Trimmed:
    """Passes text on without the whitespace at its ends, which only separates it from markers."""

    def __init__(self, sink: Sink, *, start: bool = True) -> None:
        self._sink = sink
        self._space: list[str] = []
        self._at_start = start
        """Whether whitespace that follows is dropped."""

    def push(self, text: str) -> None:
        if self._at_start:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            self._sink("".join(self._space) + body)
            self._space.clear()
            self._at_start = False
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def restart(self) -> None:
        """Call this at a marker."""
        self._space.clear()
        self._at_start = True

    def flush(self) -> None:
        """Call this at the end of the text: trailing whitespace belongs to the text."""
        if self._space:
            self._sink("".join(self._space))
            self._space.clear()

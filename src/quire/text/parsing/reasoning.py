"""Parser of the reasoning before an answer, between two markers."""

from __future__ import annotations

from dataclasses import dataclass

from quire.text.parsing.base import Event, Parser, ReasoningDelta
from quire.text.parsing.reader import ReadingParser, Steps, Trimmed


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    start: str
    end: str


class ThinkParser(ReadingParser):
    """Reads the reasoning and passes the rest to `inner`.

    `inside`: the prompt has opened the reasoning. Otherwise an opening marker counts only at the
        beginning of the
    output: later it is part of the answer's text.
    """

    def __init__(self, form: ReasoningFormat, inner: Parser, *, inside: bool) -> None:
        super().__init__()
        self._form = form
        self._inner = inner
        self._inside = inside

    def _read(self) -> Steps[None]:
        r, form = self._reader, self._form
        r.keep()
        yield from r.space()
        opened = yield from r.literal(form.start)
        before = r.forget()
        if opened or self._inside:
            thoughts = Trimmed(lambda text: self._events.append(ReasoningDelta(text)))
            if (yield from r.until((form.end,), thoughts.push)):
                yield from r.space()
            else:
                thoughts.flush()
        else:
            self._pass_on(before)
        while (yield from r.peek()):
            self._pass_on(r.take(r.unread))
        self._pass_on("", final=True)

    def _pass_on(self, text: str, *, final: bool = False) -> None:
        self._events += self._inner.push(text, final=final)


class HiddenTokens:
    """Drops the special tokens that `inner` does not need, for an output whose text shows all special tokens
    because `inner` needs some."""

    def __init__(self, hidden: frozenset[str], inner: Parser) -> None:
        self._hidden = tuple(sorted(hidden, key=len, reverse=True))
        self._first = {token[0] for token in hidden}
        self._longest = max(map(len, hidden))
        self._inner = inner
        self._held = ""

    def push(self, delta: str, *, final: bool = False) -> list[Event]:
        text, shown, at = self._held + delta, list[str](), 0
        self._held = ""
        places = dict.fromkeys(self._first, -1)
        while at < len(text):
            for char, place in places.items():
                if place < at:
                    places[char] = text.find(char, at) % (len(text) + 1)  # -1: past the end
            begin = min(places.values())
            if begin >= len(text):
                break
            shown.append(text[at:begin])
            rest = text[begin : begin + self._longest]
            if (
                not final
                and len(rest) < self._longest
                and any(t.startswith(rest) for t in self._hidden)
            ):
                at, self._held = len(text), rest
                break
            token = next((t for t in self._hidden if rest.startswith(t)), None)
            at = begin + (len(token) if token else 1)
            if not token:
                shown.append(text[begin])
        shown.append(text[at:])
        return self._inner.push("".join(shown), final=final)

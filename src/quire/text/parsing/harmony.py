"""gpt-oss's format, in which an output is a list of messages with headers.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
"""

from __future__ import annotations

from quire.text.parsing.base import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from quire.text.parsing.reader import ReadingParser, Steps

MARKERS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
MAX_HEADER = 512
FUNCTION = "functions."


class HarmonyParser(ReadingParser):
    """The channel "analysis" is reasoning, messages to functions are calls (if the request has tools),
    and all other messages are the answer."""

    def __init__(self, *, calls: bool) -> None:
        super().__init__()
        self._calls = calls
        self._next_index = 0

    def _answer(self, text: str) -> None:
        self._events.append(TextDelta(text))

    def _think(self, text: str) -> None:
        self._events.append(ReasoningDelta(text))

    def _read(self) -> Steps[None]:
        r = self._reader
        while True:
            marker = yield from r.until(("<|start|>", "<|channel|>"), self._answer)
            if not marker:
                return
            r.keep(marker)
            header: list[str] = []
            if not (yield from r.until(("<|message|>",), header.append, limit=MAX_HEADER)):
                self._answer(r.forget())
                continue
            r.forget()
            channel, recipient = _parse_header(marker + "".join(header))
            if self._calls and recipient.startswith(FUNCTION):
                yield from self._call(recipient.removeprefix(FUNCTION))
            yield from self._body(channel)

    def _call(self, name: str) -> Steps[None]:
        """Read a call's arguments; the rest of the message is its body."""
        r = self._reader
        if (yield from r.space()) != "{":
            return
        index = self._next_index
        self._next_index += 1
        self._events.append(ToolCallStart(index, name))
        if (yield from r.value(lambda text: self._events.append(ToolCallArguments(index, text)))):
            self._events.append(ToolCallEnd(index))
            yield from r.space()

    def _body(self, channel: str) -> Steps[None]:
        r = self._reader
        sink = self._think if channel == "analysis" else self._answer
        ended = yield from r.until(("<|end|>", "<|return|>", "<|call|>", "<|start|>"), sink)
        if ended == "<|start|>":
            r.back(len(ended))


def _parse_header(header: str) -> tuple[str, str]:
    """The channel and the recipient; "" for one that the header does not name."""
    words = header.replace("<|", " <|").replace("|>", "|> ").split()
    channel = recipient = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "<|channel|>":
            channel = following
        elif word.startswith("to="):
            recipient = word.removeprefix("to=")
    return channel, recipient

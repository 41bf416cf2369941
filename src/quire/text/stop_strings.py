"""Stop strings in a stream: hold text that may be the beginning of one, and end at the first.

An Aho-Corasick automaton (Aho & Corasick 1975) over the stop strings, fed one delta at a time. The
obvious way, searching the whole text again at every token, is quadratic. The usual way, holding
`max(len(stop)) - 1` characters, delays all text by that much. The depth of the automaton's state is the
length of the longest end of the text that is the beginning of a stop string, so exactly that much is
held. A character takes constant time, however long the stop strings are.

Which stop string counts: the one that is completed first; of two that are completed at the same
character, the longer. A stream can follow this rule without looking ahead, so the result does not depend
on how the text was cut into deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.errors import InvalidParameterError

MAX_STOP_CHARS = 16_384


class StopStringScanner:
    """Takes text, and returns the text that may be shown. `matched` is the stop string once one is found.

    With `include`, the text ends after the stop string instead of before it.
    """

    __slots__ = (
        "_depth",
        "_fail",
        "_firsts",
        "_goto",
        "_held",
        "_include",
        "_output",
        "_state",
        "matched",
    )

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        _check_stop(stop)
        self._include = include
        self._state = 0
        self._held = ""  # the last `depth[state]` characters of the text, not yet released
        self.matched: str | None = None
        self._goto: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._output: list[str | None] = [None]
        for text in stop:
            self._add(text)
        self._fail = self._link()
        self._firsts = tuple(self._goto[0])

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._goto[node].get(char)
            if child is None:
                child = len(self._goto)
                self._goto[node][char] = child
                self._goto.append({})
                self._depth.append(self._depth[node] + 1)
                self._output.append(None)
            node = child
        self._output[node] = stop

    def _link(self) -> list[int]:
        """Failure links, breadth first: the node of the longest proper suffix that is a prefix."""
        fail = [0] * len(self._goto)
        queue = list(self._goto[0].values())
        for node in queue:
            for char, child in self._goto[node].items():
                back = fail[node]
                while back and char not in self._goto[back]:
                    back = fail[back]
                fail[child] = self._goto[back].get(char, 0)
                queue.append(child)
            if self._output[node] is None:
                self._output[node] = self._output[fail[node]]
        return fail

    def feed(self, text: str, *, armed: bool = True) -> str:
        """The text that `text` releases. While not `armed` (`min_tokens`), a completed stop string does not
        count. One that begins before and is completed after does."""
        if self._state == 0:
            for char in self._firsts:
                if char in text:
                    break
            else:
                return text  # the common case: no part of it can begin a stop string
        goto, fail, output = self._goto, self._fail, self._output
        state = self._state
        for index, char in enumerate(text):
            while state and char not in goto[state]:
                state = fail[state]
            state = goto[state].get(char, 0)
            stop = output[state]
            if stop is not None:
                if armed:
                    return self._match(stop, text[: index + 1])
                while (
                    state and not goto[state]
                ):  # completed while not armed, and cannot become a longer one
                    state = fail[state]
        self._state = state
        seen = self._held + text
        keep = len(seen) - self._depth[state]
        self._held = seen[keep:]
        return seen[:keep]

    def _match(self, stop: str, text: str) -> str:
        self.matched = stop
        self._state = 0
        seen, self._held = self._held + text, ""
        return seen if self._include else seen[: len(seen) - len(stop)]

    def flush(self) -> str:
        """The text that is still held; no more text follows."""
        held, self._held, self._state = self._held, "", 0
        return held


def _check_stop(stop: Sequence[str]) -> None:
    if any(not isinstance(text, str) or not text for text in stop):
        raise InvalidParameterError(
            "stop strings must be non-empty strings; leave `stop` out for none.",
            param="stop",
            value=stop,
        )
    total = sum(map(len, stop))
    if total > MAX_STOP_CHARS:
        raise InvalidParameterError(
            f"The stop strings have {total} characters together; at most {MAX_STOP_CHARS} are allowed.",
            param="stop",
        )

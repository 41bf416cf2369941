"""Finds the end of a JSON value character by character, and whether it is valid.

The standard library's parser needs the whole text: if it raises, one does not know whether more text
would help. This one neither recurses nor looks back, so its time is proportional to the length of the
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable

SPACE = " \t\r\n"
MAX_DEPTH = 128
MAX_NUMBER = 512

_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-.")
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSERS = {"{": "}", "[": "]"}


class JsonScanner:
    """The state of one value. `ended`: it is complete. `failed`: it cannot become JSON."""

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self._closers: list[str] = []
        self._state: Callable[[str], bool] = self._value
        self._in_key = False
        self._word: list[str] = []
        self._hex_left = 0

    def scan(self, text: str, at: int, end: int) -> tuple[str, int]:
        """Continue with `text[at:end]`. Returns the part that belongs to the value, and the index after it.

        Control characters in strings, which models write and JSON forbids, are returned escaped.
        """
        out: list[str] = []
        while at < end and not self.ended:
            char = text[at]
            if self._state == self._in_word and char not in _WORD:
                self._end_word()
                continue
            if not self._state(char):
                self.failed = True
            if self.failed:
                break
            out.append(char if char >= " " or self._state != self._string else escaped(char))
            at += 1
        return "".join(out), at

    def finish(self) -> bool:
        """End of the text. Returns whether the value is complete (a number can be complete only here)."""
        if self._state == self._in_word:
            self._end_word()
        return self.ended and not self.failed

    # Each state takes a character and returns whether the character is allowed there.

    def _value(self, char: str) -> bool:
        if char == '"':
            self._state = self._string
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            self._state = self._first_key if char == "{" else self._first_item
            return len(self._closers) <= MAX_DEPTH
        elif char in _WORD:
            self._word = [char]
            self._state = self._in_word
        else:
            return char in SPACE
        return True

    def _first_item(self, char: str) -> bool:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> bool:
        return self._close(char) if char == "}" else self._key(char)

    def _key(self, char: str) -> bool:
        if char == '"':
            self._in_key = True
            self._state = self._string
            return True
        return char in SPACE

    def _colon(self, char: str) -> bool:
        if char == ":":
            self._state = self._value
            return True
        return char in SPACE

    def _more(self, char: str) -> bool:
        if char == ",":
            self._state = self._key if self._closers[-1] == "}" else self._value
            return True
        return char in SPACE or self._close(char)

    def _close(self, char: str) -> bool:
        if char != self._closers[-1]:
            return False
        self._closers.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self.ended = not self._closers
        self._state = self._more

    def _string(self, char: str) -> bool:
        if char == "\\":
            self._state = self._escape
        elif char == '"' and self._in_key:
            self._in_key = False
            self._state = self._colon
        elif char == '"':
            self._end_value()
        return True

    def _escape(self, char: str) -> bool:
        self._state = self._hex if char == "u" else self._string
        self._hex_left = 4
        return char in '"\\/bfnrtu'

    def _hex(self, char: str) -> bool:
        self._hex_left -= 1
        if not self._hex_left:
            self._state = self._string
        return char in _HEX

    def _in_word(self, char: str) -> bool:
        self._word.append(char)
        return len(self._word) <= MAX_NUMBER

    def _end_word(self) -> None:
        self.failed = not is_word("".join(self._word))
        self._end_value()


def is_word(text: str) -> bool:
    """true, false, null or a number; not NaN, which Python's parser accepts."""
    if text in ("true", "false", "null"):
        return True
    try:
        json.loads(text)
    except ValueError:
        return False
    return text[-1].isdigit()


def escaped(text: str) -> str:
    """`text` as it is written between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]

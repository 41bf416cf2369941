"""Server-sent events, sans-IO: bytes in, complete `data` payloads out.

As in the HTML standard (section 9.2.6): lines end in LF, CRLF or CR, `data` lines of an event are joined by
LF, comments and other fields are skipped. Events are the same however the bytes were cut.
"""

from __future__ import annotations

MAX_PENDING_BYTES = 16 << 20


class SseParser:
    """Parses server-sent events; `feed` returns the payloads of the events that `data` completes."""

    __slots__ = ("_data", "_first", "_pending")

    def __init__(self) -> None:
        self._pending = b""
        self._data: list[bytes] = []
        self._first = True

    def feed(self, data: bytes) -> list[bytes]:
        """Raises `ValueError` for a line that is too long."""
        fresh = not (self._pending or self._data or self._first)
        if (
            fresh
            and data.startswith(b"data: ")
            and data.endswith(b"\n\n")
            and data.find(b"\n") == len(data) - 2
            and b"\r" not in data
        ):
            return [data[6:-2]]  # the usual case: exactly one whole event
        return self._feed_lines(data)

    def _feed_lines(self, data: bytes) -> list[bytes]:
        data = self._pending + data
        if self._first:
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._pending = data
                return []
            self._first = False
            data = data.removeprefix(b"\xef\xbb\xbf")
        lines = data.splitlines(keepends=True)  # for bytes, it splits at LF, CRLF and CR only
        self._pending = b""
        if lines and (lines[-1][-1] != 0x0A):
            # Incomplete, or ended by a CR whose LF may follow.
            self._pending = lines.pop()
            if len(self._pending) > MAX_PENDING_BYTES:
                raise ValueError("an event's line is too long")
        events = []
        for line in lines:
            text = line.rstrip(b"\r\n")
            if not text:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif text.startswith(b"data:"):
                value = text[5:]
                self._data.append(value[1:] if value.startswith(b" ") else value)
            elif text == b"data":
                self._data.append(b"")
        return events

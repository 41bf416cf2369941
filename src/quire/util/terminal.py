"""Makes text from models, clients and files safe to print on a terminal."""

from __future__ import annotations

_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPED |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F))}
_ESCAPED |= {code: f"\\u{code:04x}" for code in range(0x2066, 0x206A)}
_ESCAPED[ord("\n")] = "\\n"
_ESCAPED[ord("\r")] = "\\r"
del _ESCAPED[ord("\t")]
_KEEPING_LINES = {code: shown for code, shown in _ESCAPED.items() if code != ord("\n")}


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with control characters shown as escapes.

    An escape sequence can rename a window, hide a line or write to a clipboard; a newline can forge a log
    entry; bidirectional overrides can show other text than there is. All of them are escaped.
    """
    return text.translate(_KEEPING_LINES if keep_newlines else _ESCAPED)

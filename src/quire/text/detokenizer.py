"""Incremental detokenizer: token ids in, text out as soon as it is certain. Sans-IO.

The invariant: the concatenated deltas are the same however the ids were split into pushes, and equal
`decode(prompt + output)` without its beginning `decode(prompt)`. Text that was released is never changed.
So a character is held until its last byte is known, and text that may begin a stop string is held until
it no longer can.

Why not `tokenizers.decoders.DecodeStream`? It re-decodes a window for every token and guesses from a
trailing U+FFFD that a character is incomplete, so a run of bytes that never forms one keeps the window
growing: 4,000 such tokens take a second, on the event loop, and capping the window breaks characters at
the cap. For the decoders that are concatenations (see `pieces.py`) each token costs
one table look-up, bytes go through a UTF-8 decoder with at most three pending, and invalid bytes are as
cheap as valid ones. Other decoders use `_WindowDecoder`, whose window has a maximum size.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.text.pieces import Piece
from quire.text.stop_strings import StopStringScanner

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, hence at most 4 tokens; twice that covers a window's context.
PRIMING_TOKENS = 8


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was completed.

    stop_string: which one (the request's `stop_reason`).
    num_tokens: how many tokens of this push belong to the output, the one that completes the stop
        string included; drop the rest.
    """

    stop_string: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DetokenizeResult:
    """The text that one push released, and the stop string that ended the output, if any."""

    delta: str
    stop: StopMatch | None = None


NOTHING = DetokenizeResult("")


class IncrementalDetokenizer:
    """Turns one request's output tokens into text.

    Pass only the output's tokens, without an end-of-sequence or stop token that should not be shown:
    with `skip_special_tokens=False` it would be.

    `prompt_token_ids` gives context: whether the first token starts the text (sentencepiece drops
    its leading space) and the first bytes of a character that the prompt left unfinished.
    `min_tokens`: a stop string counts only if it is completed after that many tokens.
    After a stop match further tokens are ignored: a step that was in flight may still bring some.
    """

    __slots__ = ("_decoder", "_min_tokens", "_num_tokens", "_parts", "_scanner", "_stopped")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder: _PieceDecoder | _WindowDecoder
        if tokenizer.scheme.kind == "opaque":
            self._decoder = _WindowDecoder(
                tokenizer,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        else:
            self._decoder = _PieceDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
        if prompt_token_ids:
            self._decoder.prime(prompt_token_ids)
        self._scanner = (
            StopStringScanner(stop, include=include_stop_str_in_output) if stop else None
        )
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._parts: list[str] = []
        self._stopped = False

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Sequence[int], *, final: bool = False) -> DetokenizeResult:
        """Add output tokens; `final` releases all text that is still held. O(text) in total."""
        if self._stopped:
            return NOTHING
        if self._scanner is not None:
            return self._push_scanned(token_ids, self._scanner, final)
        step = self._decoder.step
        if len(token_ids) == 1:
            delta = step(token_ids[0])
        else:
            delta = "".join([step(token_id) for token_id in token_ids])
        if final:
            delta += self._decoder.flush()
        if not delta:
            return NOTHING
        self._parts.append(delta)
        return DetokenizeResult(delta)

    def _push_scanned(
        self, token_ids: Sequence[int], scanner: StopStringScanner, final: bool
    ) -> DetokenizeResult:
        delta = ""
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            text = self._decoder.step(token_id)
            if text:
                delta += scanner.feed(text, armed=self._num_tokens > self._min_tokens)
                if scanner.matched is not None:
                    return self._release(delta, scanner.matched, index + 1)
        if final:
            text = self._decoder.flush()
            if text:
                delta += scanner.feed(text, armed=self._num_tokens > self._min_tokens)
            if scanner.matched is not None:
                return self._release(delta, scanner.matched, len(token_ids))
            delta += scanner.flush()
        return self._release(delta, None, 0)

    def _release(self, delta: str, stop: str | None, num_tokens: int) -> DetokenizeResult:
        if delta:
            self._parts.append(delta)
        if stop is None:
            return DetokenizeResult(delta)
        self._stopped = True
        return DetokenizeResult(delta, StopMatch(stop, num_tokens))


class _PieceDecoder:
    """Concatenates pieces; bytes stay in `_pending` until they form a character or cannot form one.

    Invalid bytes become U+FFFD as in the decoder of whole texts: one per maximal invalid
    subsequence for byte-level, one per byte for sentencepiece.
    """

    __slots__ = ("_carried", "_fresh", "_pending", "_per_byte", "_pieces", "_scheme", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._scheme = tokenizer.scheme
        self._pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._per_byte = tokenizer.scheme.kind != "byte_level"
        self._pending = b""  # 0..3 bytes: a proper prefix of a character
        self._carried = 0  # U+FFFDs for `_pending` at the end of the prompt's own text
        self._fresh = tokenizer.scheme.strip != "none"  # no text yet: the decoder would strip

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        """Set the state after the prompt, from its last few tokens."""
        head, tail = prompt_token_ids[:-PRIMING_TOKENS], prompt_token_ids[-PRIMING_TOKENS:]
        if self._fresh and any(self._pieces[token_id] for token_id in head):
            self._fresh = False
        for token_id in tail:
            self.step(token_id)
        if self._pending:
            self._carried = len(self._pending) if self._per_byte else 1

    def step(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if not piece:
            return ""
        if self._fresh:
            return self._first(token_id, piece)
        if type(piece) is str:
            return self.flush() + piece if self._pending else piece
        return self._bytes(piece)

    def _bytes(self, piece: Piece) -> str:
        assert isinstance(piece, bytes)
        held, data = self._pending, self._pending + piece
        if self._per_byte:
            text, self._pending = _decode_each(held, piece)
        else:
            text, consumed = utf_8_decode(data, "replace", False)
            self._pending = data[consumed:]
        if self._carried and text:
            text = self._drop_carried(text)
        return text

    def _drop_carried(self, text: str) -> str:
        """The prompt's text already ends in U+FFFD for the bytes that turned out invalid."""
        carried, self._carried = self._carried, 0
        while carried and text.startswith(REPLACEMENT):
            text, carried = text[1:], carried - 1
        return text

    def _first(self, token_id: int, piece: Piece) -> str:
        """The first visible token of a text: apply the decoder's strip."""
        if self._scheme.strip == "first_token_markers":
            self._fresh = False
            token = self._tokenizer.token_str(token_id) or ""
            return token.replace(self._scheme.marker, "")
        if isinstance(piece, bytes):
            text = self._bytes(piece)
        else:
            text = self.flush() + piece
        if text:
            self._fresh = False
        return text[1:] if text.startswith(" ") else text

    def flush(self) -> str:
        if not self._pending:
            return ""
        text = REPLACEMENT * (len(self._pending) if self._per_byte else 1)
        self._pending = b""
        return self._drop_carried(text) if self._carried else text


def _decode_each(held: bytes, piece: bytes) -> tuple[str, bytes]:
    """Text and pending bytes after one byte, with a U+FFFD for each invalid byte."""
    try:
        text, consumed = utf_8_decode(held + piece, "strict", False)
        return text, (held + piece)[consumed:]
    except UnicodeDecodeError:
        if not held:
            return REPLACEMENT, b""
        text, pending = _decode_each(b"", piece)
        return REPLACEMENT * len(held) + text, pending


class _WindowDecoder:
    """For decoders whose text depends on neighbours: decode a short window, emit what is new.

    `_ids[:_known]` is context whose text was emitted. Text is emitted as soon as the window's text has
    grown and does not end in an incomplete character. If that takes more than `PRIMING_TOKENS` tokens
    (invalid bytes, tokens without text), the text is emitted as it is. So the size of the window, and the
    cost per token, is bounded.
    """

    __slots__ = (
        "_after_special",
        "_context_text",
        "_hidden",
        "_ids",
        "_joined",
        "_known",
        "_tokenizer",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        joined = not spaces_between_special_tokens and not skip_special_tokens
        self._joined = tokenizer.added_ids if joined else frozenset()
        self._after_special = False
        self._ids: list[int] = []
        self._known = 0
        self._context_text = ""

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        tail = prompt_token_ids[-PRIMING_TOKENS:]
        self._ids = [
            i for i in tail if i not in self._hidden and self._tokenizer.token_str(i) is not None
        ]
        self._known = len(self._ids)
        self._context_text = self._decode(self._ids)

    def step(self, token_id: int) -> str:
        token = self._tokenizer.token_str(token_id)
        if token is None or token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        unfinished = len(text) <= len(self._context_text) or text.endswith(REPLACEMENT)
        if unfinished and len(self._ids) - self._known < PRIMING_TOKENS:
            return ""
        delta = self._advance(text)
        if self._joined:
            special = token_id in self._joined
            if special and self._after_special:
                delta = token
            self._after_special = special
        return delta

    def _advance(self, text: str) -> str:
        """Emit the window's new text; its tokens become the context of the next window."""
        context = self._context_text
        if text.startswith(context):
            delta = text[len(context) :]
        else:  # the decoder changed text that was already emitted: decode only the new tokens
            delta = self._decode(self._ids[self._known :])
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        self._context_text = self._decode(self._ids)
        return delta

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if len(self._ids) > self._known else ""

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

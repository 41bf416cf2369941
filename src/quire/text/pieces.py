"""The piece of text of each token: the decoder of tokenizer.json as a table.

`tokenizers` decodes lists. A server decodes one token at a time, for hundreds of requests at once, and
`logprobs` needs the exact bytes of each token. Nearly every generative tokenizer uses one of three decoders
whose result is a concatenation of one piece per token:

    byte-level      GPT-2, Llama 3, Qwen, DeepSeek, tekken: one alphabet character per byte
    sentencepiece   Llama 2, Mistral 7B, Gemma: "▁" is a space, `<0xNN>` is a byte, first space stripped
    metaspace       T5-like: "▁" is a space, the first token's is dropped

For these a token's piece never changes: `str` where the token is whole characters, `bytes` where it is
(or may be) part of one. `PieceTable` is filled on demand, so loading a vocabulary of 150,000 entries costs
nothing. Any other decoder (WordPiece, CTC, BPE with suffixes) is "opaque": its text
depends on neighbours, and the detokenizer falls back to decoding a sliding window.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Piece = str | bytes

SPACE_MARKER = "\u2581"  # ▁, sentencepiece's visible space


@dataclass(frozen=True, slots=True)
class PieceScheme:
    """How a tokenizer's decoder turns tokens into text.

    kind: which of the families above.
    byte_fallback: `<0xNN>` tokens stand for one byte.
    strip: what the decoder drops at the very start of a text: nothing, one space, or every
        marker in the first token.
    marker: the character that stands for a space.
    """

    kind: Literal["byte_level", "sentencepiece", "opaque"]
    byte_fallback: bool = False
    strip: Literal["none", "one_space", "first_token_markers"] = "none"
    marker: str = SPACE_MARKER


OPAQUE = PieceScheme("opaque")


def piece_scheme(backend: Backend) -> PieceScheme:
    """Classify the backend's decoder; any that is not recognized exactly is "opaque"."""
    decoder = backend.decoder
    if decoder is None:
        return OPAQUE
    spec = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
    kinds = [step.get("type") for step in steps]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        return PieceScheme("byte_level")
    if kinds == ["Metaspace"]:
        drops = steps[0].get("prepend_scheme", "always") != "never"
        strip: Literal["none", "first_token_markers"] = "first_token_markers" if drops else "none"
        return PieceScheme("sentencepiece", strip=strip, marker=steps[0]["replacement"])
    return _sentencepiece_scheme(kinds, steps)


def _sentencepiece_scheme(
    kinds: list[str | None], steps: list[Mapping[str, object]]
) -> PieceScheme:
    """Replace(marker -> " "), ByteFallback, Fuse, then optionally Strip(one leading space)."""
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return OPAQUE
    pattern = steps[0].get("pattern")
    marker = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(marker, str) or len(marker) != 1 or steps[0].get("content") != " ":
        return OPAQUE
    if kinds[3:] == []:
        return PieceScheme("sentencepiece", byte_fallback=True, marker=marker)
    strip = steps[3]
    if (strip.get("content"), strip.get("start"), strip.get("stop")) != (" ", 1, 0):
        return OPAQUE
    return PieceScheme("sentencepiece", byte_fallback=True, strip="one_space", marker=marker)


def byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: 256 printable characters, each standing for one byte.

    Printable Latin-1 bytes stand for themselves; the other 68, in order, are U+0100 upwards
    (Radford et al. 2019, GPT-2's encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class PieceTable(dict[int, Piece]):
    """`table[token_id]` is the token's piece; filled on first use, at most one entry per id seen.

    An id outside the vocabulary is the empty string: models have more logits than tokens, and
    `Tokenizer.decode` skips such ids too. Ids in `hidden` are empty as well (special tokens that
    are to be skipped).
    """

    __slots__ = ("_alphabet", "_backend", "_hidden", "_limit", "_scheme")

    def __init__(
        self, backend: Backend, scheme: PieceScheme, *, hidden: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self._backend = backend
        self._scheme = scheme
        self._hidden = hidden
        self._limit = 1 << 32  # ids cross into Rust as u32
        alphabet = byte_alphabet() if scheme.kind == "byte_level" else {}
        self._alphabet = {ord(char): chr(byte) for char, byte in alphabet.items()}

    def __missing__(self, token_id: int) -> Piece:
        if not 0 <= token_id < self._limit:
            return ""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return ""  # not stored: ids that clients choose must not make the table grow
        piece: Piece = "" if token_id in self._hidden else self._piece(token)
        self[token_id] = piece
        return piece

    def _piece(self, token: str) -> Piece:
        if self._scheme.kind == "byte_level":
            return self._byte_level_piece(token)
        if self._scheme.byte_fallback and (byte := fallback_byte(token)) is not None:
            return bytes([byte])
        return token.replace(self._scheme.marker, " ")

    def _byte_level_piece(self, token: str) -> Piece:
        # A token with any character outside the alphabet (an added token with a space, say) is
        # its own text; that is the decoder's rule.
        if not all(ord(char) in self._alphabet for char in token):
            return token
        raw = token.translate(self._alphabet).encode("latin-1")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw


def fallback_byte(token: str) -> int | None:
    """The byte that a `<0xNN>` token stands for, or None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    digits = token[3:5]
    return int(digits, 16) if all(c in "0123456789abcdefABCDEF" for c in digits) else None

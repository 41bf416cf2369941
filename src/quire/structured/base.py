"""What the engine knows of grammars: a compiled `Grammar`, and one `TokenMatcher` per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quire.errors import InvalidParameterError
from quire.messages import GrammarSpec

Mask = NDArray[np.int32]
"""[ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set where token t is allowed."""

COMPILE_STACK_BYTES = 256 << 20
"""Stack of a thread that compiles (address space; pages are taken as they are used). llguidance descends
once per rule or `$ref`: a chain of 3,000 rules overflows the usual 8 MiB, which ends the process."""


class GrammarError(InvalidParameterError):
    """A grammar that cannot be compiled, or not followed any further. It ends one request only."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The grammar of this request cannot be used: {reason}", param="structured_outputs"
        )


def invalid(what: str, value: object = None) -> InvalidParameterError:
    """The error for a request that asks for something that is no grammar: `raise invalid(...)`."""
    return InvalidParameterError(
        f"structured_outputs: {what}", param="structured_outputs", value=value
    )


class TokenMatcher(Protocol):
    """Where one request stands in its grammar: a function of the tokens accepted, nothing else.

    So a matcher that is fed the same tokens again (after a preemption) gives the same masks.
    """

    def fill_mask(self, row: Mask) -> None:
        """Write which tokens may come next; EOS ids are among them exactly where the text may end.

        No token at all where the grammar has become too costly to follow: then the request must end.
        """

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False, and no change, if it is not allowed here."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end may follow."""


class Grammar(Protocol):
    """A compiled grammar. Immutable, and shared by all requests that have it."""

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""

    def matcher(self) -> TokenMatcher:
        """A matcher at the beginning of the text."""


class GrammarCompiler(Protocol):
    """Compiles for one vocabulary. May be called from any thread."""

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises `GrammarError`. Cannot be interrupted, and needs a deep stack (`COMPILE_STACK_BYTES`)."""


class NullGrammar:
    """Allows every token of the model, everywhere: for tests, and as the simplest member."""

    num_bytes = 0

    def __init__(self, vocab_size: int) -> None:
        self._mask = mask_of(range(vocab_size), vocab_size)

    def matcher(self) -> TokenMatcher:
        return NullMatcher(self._mask)


class NullMatcher:
    """See `NullGrammar`."""

    is_finished = False

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def fill_mask(self, row: Mask) -> None:
        row[:] = self._mask

    def accept(self, token_id: int) -> bool:
        return bool(self._mask[token_id // 32] >> (token_id % 32) & 1)


def mask_of(token_ids: Sequence[int], vocab_size: int) -> Mask:
    """The mask that allows `token_ids`, all below `vocab_size`."""
    bits = np.zeros(num_mask_words(vocab_size) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def tokens_of(mask: Mask) -> NDArray[np.int64]:
    """The tokens that a mask allows, ascending."""
    return np.flatnonzero(np.unpackbits(mask.astype("<i4").view(np.uint8), bitorder="little"))


def num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


class Vocabulary(Protocol):
    """What a compiler needs of a tokenizer; `text.Tokenizer` is one."""

    special_ids: frozenset[int]

    @property
    def max_token_id(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

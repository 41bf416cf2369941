"""What the engine knows of grammars: a compiled `Grammar`, and one `TokenMatcher` per request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quire.decoding import GrammarSpec
from quire.errors import InvalidParameterError

if TYPE_CHECKING:  # the front end knows grammars, and does without NumPy
    from quire.structured.masks import Mask

COMPILE_STACK_BYTES = 256 << 20
"""Stack of a thread that compiles (address space; pages are taken as they are used). llguidance descends
once per rule or `$ref`: a chain of 3,000 rules overflows the usual 8 MiB, which ends the process."""


class GrammarError(InvalidParameterError):
    """A grammar that cannot be compiled, or not followed any further. It ends one request only."""

    BEGINNING = "The grammar of this request cannot be used: "
    """Of every such error's text, by which it is known where only that arrives (`RequestOutput.error`)."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(self.BEGINNING + reason, param="structured_outputs")


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


class Vocabulary(Protocol):
    """What a compiler needs of a tokenizer; `text.Tokenizer` is one."""

    special_ids: frozenset[int]

    @property
    def max_token_id(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

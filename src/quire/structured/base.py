"""The protocols of grammars: a compiled `Grammar`, and one `TokenMatcher` per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.decoding import GrammarSpec
from quire.errors import InvalidParameterError

if TYPE_CHECKING:  # the front end imports this file, but not NumPy
    from quire.structured.masks import Mask

COMPILE_STACK_BYTES = 256 << 20
"""Stack size of a thread that compiles (address space; pages are taken as they are used). llguidance recurses
once per rule or `$ref`: a chain of 3,000 rules overflows the usual 8 MiB, which ends the process."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server."""

    max_bytes: int = 512 << 10
    """Limit for a grammar's text; for a schema, without its annotations."""
    whitespace: str = "bounded"
    """Whitespace in JSON if the request does not choose one: a key of `spec.WHITESPACE`."""


DEFAULT_LIMITS = Limits()


class GrammarError(InvalidParameterError):
    """A grammar that cannot be compiled, or cannot be followed further. It ends only one request."""

    BEGINNING = "The grammar of this request cannot be used: "
    """The prefix that identifies such an error where only its text arrives (`RequestOutput.error`)."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(self.BEGINNING + reason, param="structured_outputs")


class NoTokenLeftError(InvalidParameterError):
    """The constraints of a request, without a grammar, leave no next token. It ends only this request."""

    BEGINNING = "No token is left for this request: "
    """As `GrammarError.BEGINNING`."""

    def __init__(self, params: Sequence[str]) -> None:
        """params: the parameters that leave none together."""
        text = f"{self.BEGINNING}none satisfies {' and '.join(params)}."
        if "min_tokens" in params:
            text += " (Before min_tokens, no end token and none of stop_token_ids may come.)"
        super().__init__(text, param=params[0])


def invalid(what: str, value: object = None) -> InvalidParameterError:
    """The error for a request whose grammar is invalid: `raise invalid(...)`."""
    return InvalidParameterError(
        f"structured_outputs: {what}", param="structured_outputs", value=value
    )


class TokenMatcher(Protocol):
    """One request's state in its grammar. It depends only on the accepted tokens, so a matcher that is
    given the same tokens again (after a preemption) gives the same masks.
    """

    def fill_mask(self, row: Mask) -> None:
        """Write which tokens may come next. EOS ids are among them exactly where the text may end.

        If the grammar has become too costly to follow, no token is allowed: then the request must end.
        """

    def accept(self, token_id: int) -> bool:
        """Advance by one token. Returns False, and changes nothing, if the token is not allowed."""

    def copy(self) -> TokenMatcher:
        """An independent matcher in the same state, to look ahead with. An error that it meets is its own."""

    @property
    def is_finished(self) -> bool:
        """Whether only the end may follow."""


class Grammar(Protocol):
    """A compiled grammar. Immutable, and shared by all requests with the same grammar."""

    @property
    def num_bytes(self) -> int:
        """Approximate memory."""

    def matcher(self) -> TokenMatcher:
        """A matcher at the beginning of the text."""


class GrammarCompiler(Protocol):
    """Compiles for one vocabulary. May be called from any thread."""

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises `GrammarError`. Cannot be interrupted, and needs a deep stack (`COMPILE_STACK_BYTES`)."""


class Vocabulary(Protocol):
    """The methods of a tokenizer that a compiler needs; `text.Tokenizer` has them."""

    special_ids: frozenset[int]

    @property
    def max_token_id(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

"""The grammar that allows every token: for tests, and as the simplest member."""

from __future__ import annotations

from quire.structured.base import TokenMatcher
from quire.structured.masks import Mask, is_allowed, mask_of


class NullGrammar:
    """Allows every token of the model, everywhere."""

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
        return is_allowed(self._mask, token_id)

    def copy(self) -> NullMatcher:
        return self

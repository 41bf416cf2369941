"""Sets of tokens as rows of bits, and the grammar that allows them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.structured.base import TokenMatcher

Mask = NDArray[np.int32]
"""[ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set where token t is allowed."""


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

"""Sets of tokens as rows of bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def is_allowed(mask: Mask, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


def num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)

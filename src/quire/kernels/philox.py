"""Philox4x32-10: random numbers as a pure function of (seed, position, token id).

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. A counter-based
generator has no state to save, restore or share, so a request's random stream cannot depend on what
else was sampled, on preemption, or on the number of rejected drafts.

Key: the seed's low and high 32 bits. Counter: (token_id // 4, position's low and high 32 bits, 0);
each block gives four words, for four token ids in order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def philox_words(seed: int, position: int, n: int) -> NDArray[np.uint32]:
    """The first n words of that seed and position: [n] uint32."""
    blocks = (n + 3) // 4
    counter = [np.zeros(blocks, dtype=np.uint64) for _ in range(4)]
    counter[0][:] = np.arange(blocks, dtype=np.uint64)
    counter[1][:] = position & _LOW
    counter[2][:] = (position >> 32) & _LOW
    key = [seed & _LOW, (seed >> 32) & _LOW]
    shift, low = np.uint64(32), np.uint64(_LOW)
    for _ in range(_ROUNDS):
        products = [
            counter[0] * np.uint64(_MULTIPLIERS[0]),
            counter[2] * np.uint64(_MULTIPLIERS[1]),
        ]
        counter = [
            (products[1] >> shift) ^ counter[1] ^ np.uint64(key[0]),
            products[1] & low,
            (products[0] >> shift) ^ counter[3] ^ np.uint64(key[1]),
            products[0] & low,
        ]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    return np.stack(counter, axis=1).reshape(-1)[:n].astype(np.uint32)


def uniform_from_words(words: NDArray[np.uint32]) -> Tensor:
    """`(word + 1/2) / 2**32` in float32, inside (0, 1). All 32 bits are used, so that small values, which
    decide the draw, have full relative precision."""
    u = (torch.from_numpy(words.astype(np.int64)).to(torch.float32) + 0.5) * 2.0**-32
    return u.clamp(max=LARGEST_BELOW_ONE)


def gumbel_from_uniform(u: Tensor) -> Tensor:
    """Standard Gumbel noise: -log of an exponential, itself -log(1 - u)."""
    return -torch.log(-torch.log1p(-u))

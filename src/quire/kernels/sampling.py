"""What sampling is told of a row, and what comes back: shared by every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("seed", np.int64),
        ("position", np.int64),
    ]
)
"""sample_row in cpu/sampling.c. temperature: 0 is greedy, and the filters are then ignored. top_p: 1 is
off. min_p, top_k: 0 is off. seed: its 64 bits. position: index in the request of the token to be
sampled, the counter of its random stream.

One array of records, not six arrays: a step gathers its rows with one call, and passes one pointer."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """token_ids: [R] int64. valid: [R], False where the logits hold NaN; the token is then 0."""

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]

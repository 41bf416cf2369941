"""Sampling parameters of a row and the result: one record for the C, Triton and reference kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.decoding import Decoding

LARGEST = float(np.finfo(np.float32).max)

SAMPLE_ROW = np.dtype(
    [
        ("seed", np.int64),
        ("position", np.int64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("farthest", np.float32),
        ("top_k", np.int32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("num_biased", np.int32),
        ("num_banned", np.int32),
        ("banned_until", np.int32),
    ],
    align=True,
)
"""`sample_row` in cpu/sampling.c; kernels/triton/seats.py reads it as 32-bit words. A field with the name
of a `Decoding` field has the same meaning. position: index in the request of the token to be sampled, the
counter of its random stream; on a GPU, positions are passed separately. farthest: -log(min_p), the
largest distance that min_p keeps; the largest float means off. num_biased, num_banned: lengths of the
request's lists. banned_until: the banned tokens cannot be sampled at an index below it.

This is one array of records, not one array per field: a step gathers its rows with one call and passes
one pointer. There are no flags: each field has a value that means off."""

_FROM_DECODING = [name for name in SAMPLE_ROW.names or () if name in Decoding.__struct_fields__]


def sample_row(decoding: Decoding, num_prompt_tokens: int = 0) -> np.void:
    """A `SAMPLE_ROW` without its position."""
    row = np.zeros(1, dtype=SAMPLE_ROW)[0]
    for name in _FROM_DECODING:
        row[name] = getattr(decoding, name)
    row["farthest"] = -math.log(decoding.min_p) if decoding.min_p > 0 else LARGEST
    row["num_biased"] = len(decoding.logit_bias)
    row["banned_until"] = banned_until = decoding.banned_until(num_prompt_tokens)
    row["num_banned"] = len(decoding.final_ids) if banned_until else 0
    return row  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """token_ids: [R] int64. valid: [R], False where the logits hold NaN; the token is then 0."""

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]

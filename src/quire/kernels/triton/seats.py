"""Shared by the kernels that sample, edit logits and compute logprobs: the records on the device with
each seat's sampling parameters; keys that order tokens; integer weights, whose sum does not depend on the
order.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels import sampling
from quire.kernels.checks import FLOATS, KernelArgumentError
from quire.kernels.sampling import SAMPLE_ROW

TILE = 4096
"""Logits per program. It is constant, so a row is cut the same way in every batch."""

SEAT_WORDS = SAMPLE_ROW.itemsize // 4
"""Each seat's `SAMPLE_ROW` is a row of a table on the device: [max_num_seqs, SEAT_WORDS] int32."""


def as_words(rows: NDArray[np.void]) -> NDArray[np.int32]:
    """The same memory, viewed as a table. rows: [any] `SAMPLE_ROW`."""
    return rows.view(np.int32).reshape(len(rows), SEAT_WORDS)


def _place(field: str) -> tl.constexpr:
    """Offset of a field, in words of 32 bits."""
    fields = SAMPLE_ROW.fields
    assert fields is not None
    return tl.constexpr(fields[field][1] // 4)


TEMPERATURE = _place("temperature")
TOP_P = _place("top_p")
FARTHEST = _place("farthest")
TOP_K = _place("top_k")
SEED = _place("seed")
REPETITION = _place("repetition_penalty")
FREQUENCY = _place("frequency_penalty")
PRESENCE = _place("presence_penalty")
NUM_BIASED = _place("num_biased")
NUM_BANNED = _place("num_banned")
BANNED_UNTIL = _place("banned_until")

_WORDS = tl.constexpr(SEAT_WORDS)
LEAST = tl.constexpr(-(2**63))  # lower than every key of `ranked`
UNIT = tl.constexpr(2.0**40)  # of `weight`
LARGEST = tl.constexpr(sampling.LARGEST)
MOST = tl.constexpr(2**31 - 1)


@triton.jit
def word(table, row, INDEX: tl.constexpr):
    """A field of `SAMPLE_ROW` that is an integer of 32 bits."""
    return tl.load(table + row * _WORDS + INDEX)


@triton.jit
def number(table, row, INDEX: tl.constexpr):
    """A field of `SAMPLE_ROW` that is a float."""
    return word(table, row, INDEX).to(tl.float32, bitcast=True)


@triton.jit
def penalizes(table, row):
    flat = (number(table, row, FREQUENCY) != 0.0) | (number(table, row, PRESENCE) != 0.0)
    return flat | (number(table, row, REPETITION) != 1.0)


@triton.jit
def ranked(value, token_id):
    """An int64 key in the order of (value, then lowest id): the largest key belongs to the winner. NaN is
    above all numbers."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: zeros of both signs are equal
    bits = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))


@triton.jit
def ranked_value(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked_id(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def weight(distance):
    """e^-distance, in units of 2**-40: a sum of up to 2**23 of them fits, and does not depend on the
    order."""
    return (tl.exp(-distance) * UNIT).to(tl.int64)


def check_logits(name: str, logits: Tensor) -> None:
    """[R, V] with dense rows, at most 65,535 of them."""
    if (
        logits.dim() != 2
        or logits.dtype not in FLOATS
        or logits.shape[0] > 65535
        or not 0 < logits.shape[1] < 2**23
        or (logits.shape[1] > 1 and logits.stride(1) != 1)
    ):
        raise KernelArgumentError(
            f"{name} is {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}; need "
            "[up to 65535, up to 2**23] of float32, bfloat16 or float16 with dense rows"
        )


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise KernelArgumentError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; need contiguous {dtype} {shape}"
        )


def check_positions(positions: Tensor, rows: int) -> None:
    wide = positions.dtype is torch.int64
    check_index("positions", positions, torch.int64 if wide else torch.int32, (rows,))

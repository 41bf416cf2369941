"""What sampling, the edits before it and logprobs share: how a request is sampled, as a record on the
device; keys that order tokens; weights whose sum has no order.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.checks import FLOATS, KernelArgumentError

TILE = 4096
"""Logits that one program looks at: every row is cut alike, whatever else is in the batch."""

SEAT = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("farthest", np.float32),
        ("top_k", np.int32),
        ("seed", np.int64),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("num_biased", np.int32),
        ("num_banned", np.int32),
        ("banned_until", np.int32),
    ]
)
"""How a request is sampled. temperature: 0 is greedy, and the filters are then ignored. top_p: 1 is off.
farthest: -log(min_p), the largest distance that min_p keeps; the largest float is off. top_k: 0 is off.
seed: its 64 bits. repetition: 1 is off. frequency, presence: 0 is off. num_biased, num_banned: lengths of
the seat's lists. banned_until: tokens sampled at an index in the request below it are not the banned.

No word of flags says what a request needs: each value says so itself, and cannot contradict itself."""

SEAT_WORDS = SEAT.itemsize // 4


def _place(field: str) -> tl.constexpr:
    """Where a field is, in words of 32 bits."""
    fields = SEAT.fields
    assert fields is not None
    return tl.constexpr(fields[field][1] // 4)


TEMPERATURE = _place("temperature")
TOP_P = _place("top_p")
FARTHEST = _place("farthest")
TOP_K = _place("top_k")
SEED = _place("seed")
REPETITION = _place("repetition")
FREQUENCY = _place("frequency")
PRESENCE = _place("presence")
NUM_BIASED = _place("num_biased")
NUM_BANNED = _place("num_banned")
BANNED_UNTIL = _place("banned_until")

_WORDS = tl.constexpr(SEAT_WORDS)
LEAST = tl.constexpr(-(2**63))  # below every key of `ranked`
UNIT = tl.constexpr(2.0**40)  # of `weight`
LARGEST = tl.constexpr(float(np.finfo(np.float32).max))
MOST = tl.constexpr(2**31 - 1)


def seat(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    num_biased: int = 0,
    num_banned: int = 0,
    banned_until: int = 0,
) -> NDArray[np.int32]:
    """A `SEAT` as a row of the table: [SEAT_WORDS] int32. seed: 64 bits, two's complement accepted."""
    record = np.zeros(1, dtype=SEAT)
    record["temperature"] = temperature
    record["top_p"] = top_p
    record["farthest"] = -math.log(min_p) if min_p > 0 else LARGEST.value
    record["top_k"] = min(top_k, MOST.value)
    record["seed"] = seed if seed < 2**63 else seed - 2**64
    record["repetition"], record["frequency"] = repetition, frequency
    record["presence"] = presence
    record["num_biased"], record["num_banned"] = num_biased, num_banned
    record["banned_until"] = banned_until
    return record.view(np.int32)


@triton.jit
def word(table, row, INDEX: tl.constexpr):
    """A field of SEAT that is an integer of 32 bits."""
    return tl.load(table + row * _WORDS + INDEX)


@triton.jit
def number(table, row, INDEX: tl.constexpr):
    """A field of SEAT that is a float."""
    return word(table, row, INDEX).to(tl.float32, bitcast=True)


@triton.jit
def penalizes(table, row):
    flat = (number(table, row, FREQUENCY) != 0.0) | (number(table, row, PRESENCE) != 0.0)
    return flat | (number(table, row, REPETITION) != 1.0)


@triton.jit
def ranked(value, token_id):
    """An int64 in the order of (value, then lowest id): the largest names the winner. Any NaN is above
    all numbers."""
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
    """e^-distance, in units of 2**-40: sums of up to 2**23 of them fit, and do not depend on order."""
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

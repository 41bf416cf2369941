"""Log-probabilities of the chosen and of the likeliest tokens, without a log-softmax in memory.

`_part`, a program for each tile of a row with logprobs, finds the tile's k likeliest tokens, the sum of
its weights and how many of its logits are larger than the chosen one. `_merge`, a program for each such
row, merges the tiles and looks up the tokens that were requested by id. Weights are integers, as in
`sampling`, so that sums do not depend on their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import require
from quire.kernels.triton.seats import (
    LEAST,
    TILE,
    UNIT,
    check_index,
    check_logits,
    ranked,
    ranked_id,
    ranked_value,
    weight,
)

MAX_LOGPROBS = 32
_TILE = tl.constexpr(TILE)
_LISTED = tl.constexpr(64)  # ids that are looked up together


@triton.jit
def _below(value, best):
    """The distance from the best logit; 0 for the best one, even if it is infinite."""
    return tl.where(value == best, 0.0, best - value)


@triton.jit
def _reported(value, best, log_total, NORMALIZED: tl.constexpr):
    if NORMALIZED:
        value = -_below(value, best) - log_total
    return value


@triton.jit(do_not_specialize=["entries"], do_not_specialize_on_alignment=["rows", "tokens"])
def _part(logits, stride, vocab, rows, tokens, top_ptr, weight_ptr, above_ptr, entries):
    tile, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = index * tl.num_programs(0) + tile
    row = tl.load(rows + index).to(tl.int64)
    logits += row * stride
    ids = tile * _TILE + tl.arange(0, _TILE)
    inside = ids < vocab
    x = tl.load(logits + ids, mask=inside, other=-float("inf")).to(tl.float32)
    chosen = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    tl.store(above_ptr + part, tl.sum((x > chosen).to(tl.int32)))
    weights = tl.where(inside, weight(_below(x, tl.max(x))), 0)
    tl.store(weight_ptr + part, tl.sum(weights))
    keys = tl.where(inside, ranked(x, ids), LEAST)
    for place in range(entries):
        top = tl.max(keys)
        tl.store(top_ptr + part * entries + place, top)
        keys = tl.where(keys == top, LEAST, keys)


@triton.jit(
    do_not_specialize=["entries", "k", "asked"],
    do_not_specialize_on_alignment=["rows", "tokens", "asked_ids", "asked_ptr"],
)
def _merge(
    logits, stride, rows, tokens, top_ptr, weight_ptr, above_ptr, tiles, entries,
    chosen_ptr, rank_ptr, ids_ptr, values_ptr, k, asked_ids, asked_ptr, asked,
    TILES: tl.constexpr, ENTRIES: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    top_ptr += index * tiles * entries
    bests = ranked_value(tl.load(top_ptr + tile * entries, mask=inside, other=LEAST))
    best = tl.max(tl.where(inside, bests, -float("inf")))
    weights = tl.load(weight_ptr + index * tiles + tile, mask=inside, other=0)
    share = weights.to(tl.float32) * tl.exp(-_below(bests, best))
    total = tl.sum(tl.where(inside, share, 0.0).to(tl.int64))
    log_total = tl.log(total.to(tl.float32) / UNIT)
    chosen = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float32)
    tl.store(chosen_ptr + index, _reported(chosen, best, log_total, NORMALIZED))
    above = tl.load(above_ptr + index * tiles + tile, mask=inside, other=0)
    tl.store(rank_ptr + index, tl.sum(above) + 1)
    entry = tl.arange(0, ENTRIES)
    keys = tl.load(top_ptr + entry, mask=entry < tiles * entries, other=LEAST)
    for place in range(k):
        top = tl.max(keys)
        tl.store(ids_ptr + index * k + place, ranked_id(top))
        value = _reported(ranked_value(top), best, log_total, NORMALIZED)
        tl.store(values_ptr + index * k + place, value)
        keys = tl.where(keys == top, LEAST, keys)
    for start in range(0, asked, _LISTED):
        listed = start + tl.arange(0, _LISTED)
        there = listed < asked
        token = tl.load(asked_ids + index * asked + listed, mask=there, other=0)
        x = tl.load(logits + row * stride + token, mask=there, other=0.0).to(tl.float32)
        value = _reported(x, best, log_total, NORMALIZED)
        tl.store(asked_ptr + index * asked + listed, value, mask=there)


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """On the device, for each of N rows. logprob: [N] float32, the chosen token's. rank: [N] int32,
    from 1. top_ids: [N, k] int64 and top_logprobs: [N, k] float32, best first, ties by id.
    asked: [N, A] float32, in the order of the ids."""

    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    asked: Tensor


def logprobs(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    k: int,
    asked_ids: Tensor | None = None,
    *,
    normalized: bool = True,
) -> DeviceLogprobs:
    """Log-softmax of the chosen tokens, the k likeliest and the requested ones, for the rows with logprobs.
    If not `normalized`, the logits themselves.

    logits: [R, V], rows dense, any row stride. rows: [N] int32, rows with logprobs.
    token_ids: [R] int64, chosen. k: 0 to `MAX_LOGPROBS`, at most V. asked_ids: [N, A] int64, below V.
    Logits of +inf share the whole probability. The result for a row with NaN is undefined. The contents of
    rows, token_ids and asked_ids are not checked.
    """
    check_logits("logits", logits)
    vocab, count = logits.shape[1], rows.shape[0]
    check_index("rows", rows, torch.int32, (count,))
    check_index("token_ids", token_ids, torch.int64, (logits.shape[0],))
    most = min(MAX_LOGPROBS, vocab)
    require(0 <= k <= most and count <= 65535, f"k={k} of {count} rows; k is 0 to {most}")
    asked = 0 if asked_ids is None else asked_ids.shape[1]
    if asked_ids is not None:
        check_index("asked_ids", asked_ids, torch.int64, (count, asked))
    tiles, entries = triton.cdiv(vocab, TILE), max(k, 1)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    top = empty(count, tiles, entries, dtype=torch.int64)
    weights = empty(count, tiles, dtype=torch.int64)
    above = empty(count, tiles, dtype=torch.int32)
    result = DeviceLogprobs(
        logprob=empty(count, dtype=torch.float32),
        rank=empty(count, dtype=torch.int32),
        top_ids=empty(count, k, dtype=torch.int64),
        top_logprobs=empty(count, k, dtype=torch.float32),
        asked=empty(count, asked, dtype=torch.float32),
    )
    if count:
        stride = logits.stride(0)
        _part[(tiles, count)](
            logits, stride, vocab, rows, token_ids, top, weights, above, entries, num_warps=8
        )
        _merge[(count,)](
            logits, stride, rows, token_ids, top, weights, above, tiles, entries,
            result.logprob, result.rank, result.top_ids, result.top_logprobs, k,
            token_ids if asked_ids is None else asked_ids, result.asked, asked,
            # For the most that may be asked, so that every request is served by one compiled kernel.
            TILES=triton.next_power_of_2(tiles), ENTRIES=triton.next_power_of_2(tiles * MAX_LOGPROBS),
            NORMALIZED=normalized, num_warps=4,
        )  # fmt: skip
    return result

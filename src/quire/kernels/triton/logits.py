"""Edits of logits before sampling: a grammar's mask, biases, bans, penalties.

One kernel, with a program for each tile of a row, does all edits in vLLM's order: tokens that the grammar
forbids become -inf; biases are added; generated tokens are penalized; banned tokens become -inf. It does
not change its input and writes float32 to another tensor, because logprobs are of the raw logits. A batch
in which no row needs an edit need not call it.

A request with penalties has a row of counts, a 16-bit number for each token: the sign bit says that the
token is in the prompt, the rest how often it was generated, up to 32,767. At V = 152,000 that is 0.3 MB
a seat, 78 MB for 256, to be allocated when the first such request comes; nothing of a seat is read until
`SAMPLE_ROW` says that it penalizes. `sampling.sample` counts the tokens it samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.checks import require
from quire.kernels.triton.seats import (
    BANNED_UNTIL,
    FREQUENCY,
    NUM_BANNED,
    NUM_BIASED,
    PRESENCE,
    REPETITION,
    SEAT_WORDS,
    TILE,
    check_index,
    check_logits,
    check_positions,
    number,
    penalizes,
    word,
)

_TILE = tl.constexpr(TILE)
_LISTED = tl.constexpr(64)  # entries of a seat's list that are processed together
_MASKED, _PENALIZED, _BIASED, _BANNED = (tl.constexpr(1 << i) for i in range(4))
_IN_PROMPT = -(2**15)
_MOST = 2**15 - 1


@triton.jit
def _allowed(bitmask, mask_row, ids, inside, words):
    bits = tl.load(bitmask + mask_row * words + ids // 32, mask=inside, other=0)
    return ((bits >> (ids % 32)) & 1) != 0


@triton.jit
def _penalized(x, history, ids, inside, table, seat):
    past = tl.load(history + ids, mask=inside, other=0).to(tl.int32)
    repetition = number(table, seat, REPETITION)
    repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(past != 0, repeated, x)
    count = (past & 0x7FFF).to(tl.float32)
    x = tl.where(count > 0, x - number(table, seat, FREQUENCY) * count, x)
    return tl.where(count > 0, x - number(table, seat, PRESENCE), x)


@triton.jit
def _edited(x, ids, inside, history, bitmask, mask_row, words, table, seat, penalizing):
    """x: float32, biased. Masked, then penalized."""
    if mask_row >= 0:
        x = tl.where(_allowed(bitmask, mask_row, ids, inside, words), x, -float("inf"))
    if penalizing:
        x = _penalized(x, history, ids, inside, table, seat)
    return x


@triton.jit(
    do_not_specialize=["kinds", "most_biased", "most_banned"],
    do_not_specialize_on_alignment=[
        "seats", "positions", "history", "bitmask", "mask_rows", "biased_ids", "biases", "banned_ids",
    ],
)  # fmt: skip
def _edit(
    logits, stride, vocab, out, table, seats, positions, history, bitmask, mask_rows, words,
    biased_ids, biases, most_biased, banned_ids, most_banned, kinds,
):  # fmt: skip
    """kinds: which edits some row may have. The tensors of the others are not read."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seat = tl.load(seats + row).to(tl.int64)
    if seat >= 0:
        mask_row = tl.load(mask_rows + row, mask=(kinds & _MASKED) != 0, other=-1).to(tl.int64)
        history += seat * vocab
        penalizing = ((kinds & _PENALIZED) != 0) & penalizes(table, seat)
        logits += row * stride
        out += row * vocab
        ids = tile * _TILE + tl.arange(0, _TILE)
        inside = ids < vocab
        x = tl.load(logits + ids, mask=inside, other=0.0).to(tl.float32)
        x = _edited(x, ids, inside, history, bitmask, mask_row, words, table, seat, penalizing)
        tl.store(out + ids, x, mask=inside)
        if (kinds & _BIASED) != 0:
            tl.debug_barrier()  # listed tokens were written by other threads
            count = word(table, seat, NUM_BIASED)
            for start in range(0, count, _LISTED):
                entry = start + tl.arange(0, _LISTED)
                listed = tl.load(biased_ids + seat * most_biased + entry, mask=entry < count)
                here = (entry < count) & (listed // _TILE == tile)
                y = tl.load(logits + listed, mask=here, other=0.0).to(tl.float32)
                y += tl.load(biases + seat * most_biased + entry, mask=here, other=0.0)
                y = _edited(
                    y, listed, here, history, bitmask, mask_row, words, table, seat, penalizing
                )
                tl.store(out + listed, y, mask=here)
        bans = tl.load(positions + row) < word(table, seat, BANNED_UNTIL)
        if ((kinds & _BANNED) != 0) & bans:
            tl.debug_barrier()
            count = word(table, seat, NUM_BANNED)
            for start in range(0, count, _LISTED):
                entry = start + tl.arange(0, _LISTED)
                listed = tl.load(banned_ids + seat * most_banned + entry, mask=entry < count)
                here = (entry < count) & (listed // _TILE == tile)
                tl.store(out + listed, -float("inf"), mask=here)


def edit_logits(
    logits: Tensor,
    table: Tensor,
    seats: Tensor,
    positions: Tensor,
    *,
    out: Tensor,
    history: Tensor | None = None,
    bitmask: Tensor | None = None,
    bitmask_rows: Tensor | None = None,
    biased_ids: Tensor | None = None,
    biases: Tensor | None = None,
    banned_ids: Tensor | None = None,
) -> Tensor:
    """The logits to sample from. Every row is written: a row without edits is copied.

    logits: [R, V], rows dense, any row stride. table, seats, positions: as for `sampling.sample`; the row
    of a negative seat is left alone. out: [R, V] float32, not overlapping logits. history: [max_seqs, V]
    int16. bitmask: [any, ceil(V / 32)] int32, bit i % 32 of word i // 32 set where token i is allowed.
    bitmask_rows: [R] int32, each row's in bitmask, negative for none. biased_ids: [max_seqs, any] int32
    with biases, float32: of a seat the first num_biased count, no id twice. banned_ids: [max_seqs, any]
    int32, likewise; listed ids are below V. None: no row has such an edit. Returns out.
    """
    check_logits("logits", logits)
    rows, vocab = logits.shape
    seats_shape = (table.shape[0],)
    check_index("table", table, torch.int32, (*seats_shape, SEAT_WORDS))
    check_index("seats", seats, torch.int32, (rows,))
    check_positions(positions, rows)
    check_index("out", out, torch.float32, (rows, vocab))
    words = triton.cdiv(vocab, 32)
    if history is not None:
        check_index("history", history, torch.int16, (*seats_shape, vocab))
    require((bitmask is None) == (bitmask_rows is None), "bitmask and bitmask_rows go together")
    if bitmask is not None and bitmask_rows is not None:
        check_index("bitmask", bitmask, torch.int32, (bitmask.shape[0], words))
        check_index("bitmask_rows", bitmask_rows, torch.int32, (rows,))
    require((biased_ids is None) == (biases is None), "biased_ids and biases go together")
    if biased_ids is not None and biases is not None:
        check_index("biased_ids", biased_ids, torch.int32, (*seats_shape, biased_ids.shape[1]))
        check_index("biases", biases, torch.float32, biased_ids.shape)
    if banned_ids is not None:
        check_index("banned_ids", banned_ids, torch.int32, (*seats_shape, banned_ids.shape[1]))
    if rows:
        # Something stands for what is missing: a kernel without it would be another one, to be compiled.
        given = (bitmask, history, biased_ids, banned_ids)
        kinds = sum(1 << i for i, tensor in enumerate(given) if tensor is not None)
        bans = table if banned_ids is None else banned_ids
        listed = table if biased_ids is None else biased_ids
        _edit[(triton.cdiv(vocab, TILE), rows)](
            logits, logits.stride(0), vocab, out, table, seats, positions,
            out.view(torch.int16) if history is None else history,
            table if bitmask is None else bitmask, seats if bitmask_rows is None else bitmask_rows,
            words, listed, out if biases is None else biases, listed.shape[1], bans, bans.shape[1],
            kinds, num_warps=8,
        )  # fmt: skip
    return out


def history_row(
    token_ids: Sequence[int] | NDArray[np.int64], num_prompt_tokens: int, vocab_size: int
) -> NDArray[np.int16]:
    """The counts of a request that is admitted with these tokens: [V] int16, computed on the host, to be
    copied to the seat's row."""
    ids = np.asarray(token_ids, dtype=np.int64)
    counts = np.bincount(ids[num_prompt_tokens:], minlength=vocab_size)
    row = np.minimum(counts, _MOST).astype(np.int16)
    row[ids[:num_prompt_tokens]] |= np.int16(_IN_PROMPT)
    return row

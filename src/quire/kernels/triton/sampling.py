"""`Kernels.sample` on a GPU: three short launches without a sort, without probabilities in memory and
without a wait.

1. `_scan`, a program for each tile of 4,096 logits: the tile's best token and, for a row with filters,
   the best logit of each group of 64.
2. `_spread`, a program for each tile of a row that draws: the tile's winner by the Gumbel-max trick; or,
   for a row with top_p and no top_k, the sums of weights of the tile and of its groups.
3. `_finish`, a program for each row: the best of the tiles' winners. A row with filters lists the groups
   that can contain a token it keeps, finds the cut by bisection over the listed groups, and draws.

A greedy row is read once and an unfiltered row twice, for any number of rows. Tiles depend only on the
vocabulary, so even one row occupies 8 (V = 32,000) to 38 (V = 152,000) multiprocessors. One program per
row applies the filters, because few groups remain: at least k logits are at or above the k-th best of the
groups' best logits, and all tokens farther than ln(2 V / ((1 - top_p) total)) together weigh less than
half of what top_p may remove. With top_p alone, the groups of the best logits are listed until they
weigh enough, and then some more, until their tokens nearer than the last group do: not many more than
have a token that remains. The bisection reads them from the program's cache. If many remain (k above
V / 64, or nearly flat logits), one multiprocessor makes about twenty passes over the row's logits: this is
slow and correct.

A row's token does not depend on the batch or on the order in which compiled code adds: no floats are
added. Distances are compared directly, and weights e^-distance are integers in units of 2**-40, whose sum
is the same in any order. `kernels/reference.py` adds doubles instead; the two agree except for a token
whose share ends within about 1e-6 of top_p.

The parameters of a request are in a record on the device, written at admission: see `SAMPLE_ROW`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import require
from quire.kernels.triton.seats import (
    FARTHEST,
    LARGEST,
    LEAST,
    MOST,
    SEAT_WORDS,
    SEED,
    TEMPERATURE,
    TILE,
    TOP_K,
    TOP_P,
    UNIT,
    check_index,
    check_logits,
    check_positions,
    number,
    penalizes,
    ranked,
    ranked_id,
    ranked_value,
    weight,
    word,
)

SamplerLevel = Literal["greedy", "draw", "filter"]
SAMPLER_LEVELS: tuple[SamplerLevel, ...] = ("greedy", "draw", "filter")
"""greedy: all rows have temperature 0. draw: no row has filters. Each level does the work of those before
it."""

GROUP = 64
_TILE = tl.constexpr(TILE)
_GROUP = tl.constexpr(GROUP)
_CHUNK = tl.constexpr(32)  # groups read at a time, in _finish
_SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal float


@triton.jit
def _distance(logit, best, temperature):
    """The negated score, at least 0. It is 0 for the best token, even an infinite one, and for no other."""
    apart = tl.maximum(tl.div_rn(best - logit, temperature), _SMALLEST)
    return tl.where(logit == best, 0.0, apart)


@triton.jit
def _position(positions, row):
    return tl.load(positions + row).to(tl.int64)


@triton.jit
def _noise(counter, table, row, position):
    """Gumbel noise of the four token ids from 4 * counter on, for each counter, in order: [4 * n].

    See `quire.kernels.philox`. log1p is computed with log (Kahan), which is exact for tiny u too.
    """
    low = word(table, row, SEED).to(tl.uint32, bitcast=True)
    high = word(table, row, SEED + 1).to(tl.uint32, bitcast=True)
    block = counter.to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox_impl(
        block, zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32), zero, low, high
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    y = 1.0 - u
    safe = tl.where(y == 1.0, 0.5, y)
    exponential = tl.where(y == 1.0, u, -tl.log(safe) * tl.div_rn(u, 1.0 - safe))
    return -tl.log(exponential)


# --- over tiles of the vocabulary -------------------------------------------------------------------


@triton.jit
def _scan(logits, stride, vocab, best_ptr, group_ptr, FILTERS: tl.constexpr):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * _TILE + tl.arange(0, _TILE)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    tile_index = row * tl.num_programs(0) + tile
    tl.store(best_ptr + tile_index, tl.max(ranked(x, ids)))
    if FILTERS:
        per_tile: tl.constexpr = _TILE // _GROUP
        best = tl.max(tl.reshape(x, (per_tile, _GROUP)), axis=1)
        tl.store(group_ptr + tile_index * per_tile + tl.arange(0, per_tile), best)


@triton.jit
def _row_best(best_ptr, row, tiles, TILES: tl.constexpr):
    """The row's best token, as a `ranked` key, from the tiles' best."""
    tile = tl.arange(0, TILES)
    return tl.max(tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=LEAST))


@triton.jit
def _top_k(table, seat, vocab):
    """0 if it removes nothing."""
    k = word(table, seat, TOP_K)
    return tl.where(k < vocab, k, 0)


@triton.jit
def _filters(table, seat, vocab):
    cuts = (number(table, seat, TOP_P) < 1.0) | (number(table, seat, FARTHEST) < LARGEST)
    return cuts | (_top_k(table, seat, vocab) > 0)


@triton.jit
def _spread(
    logits, stride, vocab, table, seats, positions, best_ptr, part_ptr, mass_ptr,
    TILES: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    seat = tl.load(seats + row).to(tl.int64)
    if seat >= 0:
        temperature = number(table, seat, TEMPERATURE)
        best = ranked_value(_row_best(best_ptr, row, tiles, TILES))
        if (temperature > 0) & (best > -float("inf")):
            top_p_only = (_top_k(table, seat, vocab) == 0) & (number(table, seat, TOP_P) < 1.0)
            if top_p_only | (not _filters(table, seat, vocab)):
                ids = tile * _TILE + tl.arange(0, _TILE)
                x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=-float("inf"))
                distance = _distance(x.to(tl.float32), best, temperature)
                if top_p_only:
                    kept = distance <= number(table, seat, FARTHEST)
                    each = tl.where(kept, weight(distance), 0)
                    per_tile: tl.constexpr = _TILE // _GROUP
                    masses = tl.sum(tl.reshape(each, (per_tile, _GROUP)), axis=1)
                    at = (row * tiles + tile) * per_tile + tl.arange(0, per_tile)
                    tl.store(mass_ptr + at, masses.to(tl.float32))
                    part = tl.sum(masses)
                else:
                    counter = tile * (_TILE // 4) + tl.arange(0, _TILE // 4)
                    noise = _noise(counter, table, seat, _position(positions, row))
                    part = tl.max(ranked(noise - distance, ids))
                tl.store(part_ptr + row * tiles + tile, part)


# --- one row's filters ------------------------------------------------------------------------------


@triton.jit
def _listed(row, start):
    """(distances, ids) of a chunk's tokens, in the order of ids; infinitely far past the list's end.

    row: the row's logits, the vocabulary's size, the listed groups and their number, the row's largest
    logit, its temperature.
    """
    logits, vocab, list_ptr, length, best, temperature = row
    lane = tl.arange(0, _CHUNK * _GROUP)
    index = start + lane // _GROUP
    ids = tl.load(list_ptr + index, mask=index < length, other=0) * _GROUP + lane % _GROUP
    inside = (index < length) & (ids < vocab)
    x = tl.load(logits + ids, mask=inside, other=-float("inf")).to(tl.float32)
    return _distance(x, best, temperature), ids


@triton.jit
def _look(row, pivot, WEIGH: tl.constexpr):
    """Of the listed tokens: the weight (or number) of those up to the pivot, the farthest of them, and the
    nearest beyond the pivot."""
    mass = tl.zeros([_CHUNK * _GROUP], tl.int64)
    within = tl.zeros([_CHUNK * _GROUP], tl.float32)
    beyond = tl.full([_CHUNK * _GROUP], float("inf"), tl.float32)
    for start in range(0, row[3], _CHUNK):
        distance, _ids = _listed(row, start)
        near = distance <= pivot
        if WEIGH:
            mass += tl.where(near, weight(distance), 0)
        else:
            mass += near.to(tl.int64)
        within = tl.maximum(within, tl.where(near, distance, 0.0))
        beyond = tl.minimum(beyond, tl.where(near, float("inf"), distance))
    return tl.sum(mass), tl.max(within), tl.min(beyond)


@triton.jit
def _cut(row, last, target, WEIGH: tl.constexpr):
    """The smallest distance up to which the tokens' mass reaches target, and the mass nearer than that.

    Bisection by value between two tokens' distances: `first`, with less than target nearer than it
    (`before`), and `last`, up to which target is reached. Each `_look` moves one of them to another
    token, so the loop ends with the exact value.
    """
    first = last * 0.0
    before = target * 0
    while first < last:
        middle = first + (last - first) * 0.5
        pivot = tl.where(middle < last, middle, first)
        mass, within, beyond = _look(row, pivot, WEIGH)
        reached = mass >= target
        last = tl.where(reached, within, last)
        first = tl.where(reached, first, beyond)
        before = tl.where(reached, before, mass)
    return last, before


@triton.jit
def _reach(distance, k, limit):
    """A distance, at most limit, within which at least k of the groups are, and few more if values are
    similar in scale; limit if fewer than k are within it."""
    near = distance <= limit
    if tl.sum(near.to(tl.int32)) >= k:
        low = limit * 0.0
        limit = tl.max(tl.where(near, distance, 0.0))
        for _ in range(12):
            middle = low + (limit - low) * 0.5
            enough = tl.sum((distance <= middle).to(tl.int32)) >= k
            limit = tl.where(enough, middle, limit)
            low = tl.where(enough, low, middle)
    return limit


@triton.jit
def _weigh(distance, masses, target, limit):
    """A distance, at most limit, within which groups weigh at least target, and not much more; limit if there
    is none."""
    low = limit * 0.0
    for _ in range(14):
        middle = low + (limit - low) * 0.5
        enough = tl.sum(tl.where(distance <= middle, masses, 0.0)) >= target
        limit = tl.where(enough, middle, limit)
        low = tl.where(enough, low, middle)
    return limit


@triton.jit
def _list(distance, limit, list_ptr, GROUPS: tl.constexpr):
    """List the groups up to limit; their number. Other threads may still read the list, and will."""
    near = (distance <= limit).to(tl.int32)
    tl.debug_barrier()
    tl.store(list_ptr + tl.cumsum(near) - 1, tl.arange(0, GROUPS), mask=near > 0)
    tl.debug_barrier()
    return tl.sum(near)


@triton.jit
def _target(top_p, total):
    return tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _draw_listed(row, limit, ties, table, seat, position):
    """The winner, as a `ranked` key, of the tokens nearer than limit and the first `ties` at that
    distance."""
    counters: tl.constexpr = _GROUP // 4
    winner = LEAST
    seen = 0
    list_ptr, length = row[2], row[3]
    for start in range(0, length, _CHUNK):
        distance, ids = _listed(row, start)
        lane = tl.arange(0, _CHUNK * counters)
        index = start + lane // counters
        group = tl.load(list_ptr + index, mask=index < length, other=0)
        noise = _noise(group * counters + lane % counters, table, seat, position)
        tie = (distance == limit).to(tl.int32)
        kept = (distance < limit) | ((tie > 0) & (seen + tl.cumsum(tie) <= ties))
        seen += tl.sum(tie)
        key = tl.where(kept, ranked(noise - distance, ids), LEAST)
        winner = tl.maximum(winner, tl.max(key))
    return winner


@triton.jit
def _draw_filtered(
    logits, vocab, group_ptr, mass_ptr, list_ptr, limit_ptr, ties_ptr, total, best, temperature, table,
    seat, position, GROUPS: tl.constexpr,
):  # fmt: skip
    """total: the row's weight, read if there is a top_p and no top_k. Stores the cut: `limit` and `ties`."""
    top_p = number(table, seat, TOP_P)
    limit = number(table, seat, FARTHEST)
    top_k = _top_k(table, seat, vocab)
    group = tl.arange(0, GROUPS)
    groups = tl.cdiv(vocab, _GROUP)
    x = tl.load(group_ptr + group, mask=group < groups, other=-float("inf"))
    distance = _distance(x, best, temperature)
    bound = limit
    if top_k > 0:
        limit = _reach(distance, top_k, limit)
    elif top_p < 1.0:
        weighed = total.to(tl.float32) / UNIT
        bound = tl.minimum(limit, tl.log(2.0 * vocab / ((1.0 - top_p) * weighed)))
        masses = tl.load(mass_ptr + group, mask=group < groups, other=0.0)
        limit = _weigh(distance, masses, _target(top_p, total).to(tl.float32), bound)
    length = _list(distance, limit, list_ptr, GROUPS)
    if (top_k == 0) & (top_p < 1.0):
        # Tokens of listed groups that are farther than limit were counted too: list more until it suffices.
        step = limit * 0.0 + 0.25
        row = (logits, vocab, list_ptr, length, best, temperature)
        mass, _within, _beyond = _look(row, limit, True)
        while (mass < _target(top_p, total)) & (limit < bound):
            limit = tl.minimum(limit + step, bound)
            step += step
            length = _list(distance, limit, list_ptr, GROUPS)
            row = (logits, vocab, list_ptr, length, best, temperature)
            mass, _within, _beyond = _look(row, limit, True)
    row = (logits, vocab, list_ptr, length, best, temperature)

    ties = MOST
    kept = top_k.to(tl.int64)
    if top_k > 0:
        count, last, _beyond = _look(row, limit, False)
        kept = tl.minimum(kept, count)
        limit, before = _cut(row, last, kept, False)
        ties = (kept - before).to(tl.int32)
    if top_p < 1.0:
        mass, last, _beyond = _look(row, limit, True)
        if top_k > 0:
            count, _last, _beyond = _look(row, limit, False)
            mass -= (count - kept) * weight(limit)  # ties that top_k removes
            total = mass
        target = tl.minimum(
            tl.maximum(_target(top_p, total), 1), mass
        )  # the best token always remains
        limit, before = _cut(row, last, target, True)
        each = tl.maximum(weight(limit), 1)
        ties = tl.minimum((target - before + each - 1) // each, MOST).to(tl.int32)
    tl.store(limit_ptr, limit)
    tl.store(ties_ptr, ties)
    return _draw_listed(row, limit, ties, table, seat, position)


@triton.jit
def _count(past, table, seat):
    """Count the token once more, up to 32,767."""
    if penalizes(table, seat):
        count = tl.load(past)
        tl.store(past, tl.where((count & 0x7FFF) == 0x7FFF, count, count + 1))


@triton.jit(
    do_not_specialize=["counts"], do_not_specialize_on_alignment=["seats", "positions", "history"]
)
def _finish(
    logits, stride, vocab, table, seats, positions, best_ptr, group_ptr, mass_ptr, part_ptr, list_ptr,
    limit_ptr, ties_ptr, history, counts, token_ptr, valid_ptr, tiles,
    DRAWS: tl.constexpr, FILTERS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats + row).to(tl.int64)
    winner = _row_best(best_ptr, row, tiles, TILES)
    best = ranked_value(winner)
    valid = (best == best) & (seat >= 0)
    if DRAWS:
        temperature = 0.0
        if valid:
            temperature = number(table, seat, TEMPERATURE)
        if (temperature > 0) & (best > -float("inf")):
            tile = tl.arange(0, TILES)
            part = part_ptr + row * tiles + tile
            if FILTERS and _filters(table, seat, vocab):
                total = tl.sum(tl.load(part, mask=tile < tiles, other=0))
                groups = tiles * (_TILE // _GROUP)
                winner = _draw_filtered(
                    logits + row * stride, vocab, group_ptr + row * groups, mass_ptr + row * groups,
                    list_ptr + row * groups, limit_ptr + row, ties_ptr + row, total, best,
                    temperature, table, seat, _position(positions, row), GROUPS,
                )  # fmt: skip
            else:
                winner = tl.max(tl.load(part, mask=tile < tiles, other=LEAST))
    token = tl.where(valid, ranked_id(winner), 0)
    tl.store(token_ptr + row, token)
    tl.store(valid_ptr + row, valid)
    if (counts != 0) & valid:
        _count(history + seat * vocab + token, table, seat)


@triton.jit
def _process(
    logits, stride, vocab, rows, table, seats, best_ptr, limit_ptr, ties_ptr, out, tiles,
    TILES: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    seat = tl.load(seats + row).to(tl.int64)
    temperature = number(table, seat, TEMPERATURE)
    best = ranked_value(_row_best(best_ptr, row, tiles, TILES))
    draws = (temperature > 0) & (best > -float("inf"))
    limit = temperature * 0.0 + float("inf")
    ties = word(table, seat, TOP_K) * 0 + MOST
    if draws & _filters(table, seat, vocab):
        limit = tl.load(limit_ptr + row)
        ties = tl.load(ties_ptr + row)
    seen = ties * 0
    for tile in range(tiles):
        ids = tile * _TILE + tl.arange(0, _TILE)
        inside = ids < vocab
        x = tl.load(logits + row * stride + ids, mask=inside, other=-float("inf")).to(tl.float32)
        if draws:
            distance = _distance(x, best, temperature)
            tie = (inside & (distance == limit)).to(tl.int32)
            kept = (distance < limit) | ((tie > 0) & (seen + tl.cumsum(tie) <= ties))
            seen += tl.sum(tie)
            x = tl.where(kept, tl.div_rn(x, temperature), -float("inf"))
        tl.store(out + row * vocab + ids, x, mask=inside)


# --- launches ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleWorkspace:
    """Scratch memory for up to max_rows rows, for one call at a time. At V = 152,000: 30 KB per row."""

    best: Tensor
    part: Tensor
    group: Tensor
    mass: Tensor
    listed: Tensor
    limit: Tensor
    ties: Tensor
    """With `limit`, the cut of the latest call's rows with filters: a distance, and the number of tokens
    at that distance that remain."""

    @classmethod
    def create(cls, max_rows: int, vocab_size: int, device: torch.device | str) -> SampleWorkspace:
        tiles = triton.cdiv(vocab_size, TILE)
        groups = tiles * (TILE // GROUP)
        return cls(
            best=torch.empty(max_rows, tiles, dtype=torch.int64, device=device),
            part=torch.empty(max_rows, tiles, dtype=torch.int64, device=device),
            group=torch.empty(max_rows, groups, dtype=torch.float32, device=device),
            mass=torch.empty(max_rows, groups, dtype=torch.float32, device=device),
            listed=torch.empty(max_rows, groups, dtype=torch.int32, device=device),
            limit=torch.empty(max_rows, dtype=torch.float32, device=device),
            ties=torch.empty(max_rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """token_ids: [R] int64. valid: [R] bool, False for logits with NaN and for padding; the token is then
    0. They are on the device: reading them waits for it."""

    token_ids: Tensor
    valid: Tensor


def sample(
    logits: Tensor,
    table: Tensor,
    seats: Tensor,
    positions: Tensor,
    workspace: SampleWorkspace,
    *,
    level: SamplerLevel = "filter",
    history: Tensor | None = None,
) -> DeviceTokens:
    """`Kernels.sample`: one token per row, and its count in the row's history.

    logits: [R, V], rows dense, any row stride; not changed. table: [max_seqs, SEAT_WORDS] int32, see
        `seats.as_words`.
    seats: [R] int32, each row's index in the table; negative for padding. positions: [R] int32 or int64,
    index in its request of the token to be sampled. level: the highest that any row needs. history: as in
    `logits.history_row`, [max_seqs, V] int16, updated for seats with penalties; no seat twice. Contents
    are not checked: a seat outside the table reads arbitrary memory.
    """
    check_logits("logits", logits)
    rows, vocab = logits.shape
    check_index("seats", seats, torch.int32, (rows,))
    check_positions(positions, rows)
    check_index("table", table, torch.int32, (table.shape[0], SEAT_WORDS))
    tiles = triton.cdiv(vocab, TILE)
    require(
        rows <= workspace.best.shape[0] and tiles == workspace.best.shape[1],
        f"the workspace is for {workspace.best.shape[0]} rows of {workspace.best.shape[1]} tiles; "
        f"logits has {rows} of {tiles}",
    )
    if history is not None:
        check_index("history", history, torch.int16, (table.shape[0], vocab))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    valid = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows == 0:
        return DeviceTokens(tokens, valid)
    draws, filters = level != "greedy", level == "filter"
    w, stride = workspace, logits.stride(0)
    padded = triton.next_power_of_2(tiles)
    _scan[(tiles, rows)](logits, stride, vocab, w.best, w.group, FILTERS=filters, num_warps=8)
    if draws:
        _spread[(tiles, rows)](
            logits, stride, vocab, table, seats, positions, w.best, w.part, w.mass, TILES=padded,
            num_warps=8,
        )  # fmt: skip
    _finish[(rows,)](
        logits, stride, vocab, table, seats, positions, w.best, w.group, w.mass, w.part, w.listed,
        w.limit, w.ties, seats.view(torch.int16) if history is None else history, int(history is not None),
        tokens, valid, tiles,
        DRAWS=draws, FILTERS=filters, TILES=padded, GROUPS=padded * (TILE // GROUP),
        num_warps=8 if filters else 1,
    )  # fmt: skip
    return DeviceTokens(tokens, valid)


def processed(
    logits: Tensor,
    rows: Tensor,
    table: Tensor,
    seats: Tensor,
    workspace: SampleWorkspace,
    *,
    out: Tensor,
) -> Tensor:
    """The logits that the latest `sample` with this workspace drew from: divided by the temperature, -inf
    for tokens that a filter removed, and unchanged for greedy rows.

    logits, table, seats: of that call. rows: [N] int32, the rows to write, no row twice. out: [R, V]
    float32; may be the logits. Returns out.
    """
    check_logits("logits", logits)
    count, vocab = logits.shape
    check_index("rows", rows, torch.int32, (rows.shape[0],))
    check_index("out", out, torch.float32, (count, vocab))
    tiles = triton.cdiv(vocab, TILE)
    if rows.shape[0]:
        _process[(rows.shape[0],)](
            logits, logits.stride(0), vocab, rows, table, seats, workspace.best, workspace.limit,
            workspace.ties, out, tiles, TILES=triton.next_power_of_2(tiles), num_warps=8,
        )  # fmt: skip
    return out

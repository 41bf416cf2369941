"""Paged attention on the GPU: FlashAttention's running softmax over the blocks of a KV cache.

A program holds a tile of query rows (some tokens of one request, times the query heads that share a
key head) and walks tiles of BLOCK_N keys, keeping for each row the highest score so far (`peak`), the
sum of exponentials below it (`total`) and the weighted sum of values (`acc`) (Dao, FlashAttention-2,
2023, algorithm 1; scores are in units of log 2). Two ways to cut the work:

- *Splits*, for requests with few query tokens, where one program would process a long context alone. The
  keys are cut at fixed positions (`_split_start`). A program writes its split's (acc, peak, total) to the
  workspace, and the one that ends last merges them in order (in Flash-Decoding, Dao et al. 2023, a second
  kernel does: `Tile.fused`). A request within one split needs no merging.
- *Tiles*, for the others: one program for a tile of rows and all keys. Tiles of keys that every row sees
  completely need no mask.

Why the bits of a row depend only on the row and its keys: tiles of keys and splits begin at absolute
positions. A tile in which a row sees no key does not change the row's three values. Which of the two ways
is used depends on the request's own number of query tokens. Shapes come from `tuning`. So a prompt that
is cut into chunks, or begins with a prefix from the cache, has the same bits wherever it is cut, as long
as each chunk has more than `decode_query_len` tokens. A decoded token has the same bits in every batch.
It has the bits that it would have as part of a prompt only with `invariant=True`: then both ways have
tiles of one shape, and tiles are merged at the borders of splits, which takes registers and halves the
rows of a tile.

The cache: keys and values are [num_blocks, kv_heads, block_size, D] each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.checks import FLOATS, KernelArgumentError, require
from quire.kernels.triton.tuning import Key, Regime, Tile, architecture, tile

LOG2_E = 1.4426950408889634
UNIFORM = 1 << 16
"""Splits of one size with a sliding window, which sees only the last few: all of them."""
RECORD = 4
"""Floats beside acc in a partial result: peak, total, and two that keep records on 16 bytes."""
PROGRAMS = 1024
MIN_SHARES = 8
"""A launch has about PROGRAMS programs for the splits, and at least MIN_SHARES for the splits of one
request and head, so that a single program need not process a long request among many short ones. Fewer
would end 256 short requests a tenth sooner, and one long request among them 1.6 to 3 times later (simulated:
tests/triton/test_balance.py)."""
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def _split_start(index, SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr):
    """The first key of a split: PER_LEVEL splits of SPLIT keys, as many of twice that, and so on. So cuts do
    not depend on the context's length, a row's splits stay the same as it grows, and there are not many."""
    level = index // PER_LEVEL
    return SPLIT * (PER_LEVEL * ((1 << level) - 1) + ((index % PER_LEVEL) << level))


@triton.jit
def _split_index(position, SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr):
    """The split with this key."""
    level = 0
    while SPLIT * PER_LEVEL * ((2 << level) - 1) <= position:
        level += 1
    past = position - SPLIT * PER_LEVEL * ((1 << level) - 1)
    return level * PER_LEVEL + past // (SPLIT << level)


@triton.jit
def _splits(length, count, SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr, WINDOW: tl.constexpr):
    """(first, number) of the splits that the last `count` of `length` tokens see."""
    first = 0
    if WINDOW:
        first = _split_index(tl.maximum(length - count - WINDOW + 1, 0), SPLIT, PER_LEVEL)
    return first, _split_index(tl.maximum(length, 1) - 1, SPLIT, PER_LEVEL) + 1 - first


@triton.jit
def _block_ids(table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block ids of the tile of keys at `start`: one id, or one for each key if blocks are smaller than a
    tile."""
    if BLOCK_SIZE >= BLOCK_N:
        ids = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        ids = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    return ids


@triton.jit
def _load_rows(pointers, inside, columns, D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, columns.shape[1]], zero outside and from column D on."""
    if MASKED:
        rows = tl.load(pointers, mask=inside & (columns < D), other=0.0)
    elif columns.shape[1] != D:
        rows = tl.load(pointers, mask=columns < D, other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def _load_cache(
    cache, row, inside, columns, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, columns.shape[1]] of the cache seen as [rows, D]; row: the first of a block or tile."""
    n = tl.arange(0, BLOCK_N)[:, None]
    if TMA:
        rows = cache.load([row, 0])
        if MASKED:
            rows = tl.where(inside, rows.to(tl.float32), 0.0)
    elif BLOCK_SIZE >= BLOCK_N:
        at = cache + row.to(tl.int64) * D
        rows = _load_rows(at + n * D + columns, inside, columns, D, MASKED)
    else:
        at = cache + row.to(tl.int64)[:, None] * D
        rows = _load_rows(at + n % BLOCK_SIZE * D + columns, inside, columns, D, MASKED)
    return rows


@triton.jit
def _walk(
    q, acc, peak, total, start, end, lowest, positions, keys, values, table, head, scale, cap,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys from `start` up to `end` to (acc, peak, total).

    Without MASKED, every row sees all of these keys. With MASKED, no row sees a key below `lowest` or from
    `end` on; their slots may hold any bits.
    """
    columns = tl.arange(0, q.shape[1])[None, :]
    ids = _block_ids(table, start, end, BLOCK_SIZE, BLOCK_N)
    for begin in range(start, end, BLOCK_N):
        row = (ids * KV_HEADS + head) * BLOCK_SIZE
        if BLOCK_SIZE >= BLOCK_N:
            row += begin % BLOCK_SIZE
        # Load the next tile's block ids one iteration early, so that its address is known.
        ids = _block_ids(table, begin + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        key = begin + tl.arange(0, BLOCK_N)
        inside = ((key >= lowest) & (key < end))[:, None]
        k = _load_cache(keys, row, inside, columns, D, BLOCK_SIZE, BLOCK_N, TMA, False).to(q.dtype)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if CAPPED:  # tanh; `scale` makes it the cap, in units of log 2
            scores = 1.0 - 2.0 / (tl.exp2(scores * cap) + 1.0)
        if MASKED:
            seen = key[None, :] <= positions[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = _finite(raised) if MASKED else raised
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        v = _load_cache(values, row, inside, columns, D, BLOCK_SIZE, BLOCK_N, TMA, MASKED).to(
            q.dtype
        )
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = raised
    return acc, peak, total


@triton.jit
def _finite(peak):
    """The value to subtract from scores: 0 for a row that has seen no key, since -inf - -inf is NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _attend(
    q, positions, first, last, start, end, keys, values, table, head, scale, cap,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(acc, peak, total) of the keys from `start`, a multiple of BLOCK_N, up to `end`.

    first, last: the lowest and the highest of the rows' positions.
    """
    acc = tl.zeros(q.shape, tl.float32)
    peak = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    end = tl.minimum(end, last + 1)
    lowest = 0
    whole = start  # every row's window has begun here
    if WINDOW:
        lowest = tl.maximum(first - WINDOW + 1, 0)
        start = tl.maximum(start, lowest // BLOCK_N * BLOCK_N)
        whole = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, start), tl.maximum(end, start))
        acc, peak, total = _walk(
            q, acc, peak, total, start, whole, lowest, positions, keys, values, table, head, scale, cap,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA, True,
        )  # fmt: skip
    diagonal = tl.maximum(whole, tl.minimum(end, first + 1) // BLOCK_N * BLOCK_N)
    acc, peak, total = _walk(
        q, acc, peak, total, whole, diagonal, lowest, positions, keys, values, table, head, scale, cap,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA, False,
    )  # fmt: skip
    return _walk(
        q, acc, peak, total, diagonal, end, lowest, positions, keys, values, table, head, scale, cap,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA, True,
    )  # fmt: skip


@triton.jit
def _merge(acc, peak, total, more_acc, more_peak, more_total):
    """(acc, peak, total) of two parts of the keys, the first part and the one after it.

    Written with explicit fused operations, so that both kernels that merge round in the same way.
    """
    raised = tl.maximum(peak, more_peak)
    base = _finite(raised)
    shrink, more_shrink = tl.exp2(peak - base), tl.exp2(more_peak - base)
    total = tl.fma(total, shrink, more_total * more_shrink)
    if len(acc.shape) == 2:
        shrink, more_shrink = shrink[:, None], more_shrink[:, None]
    return tl.fma(acc, shrink, more_acc * more_shrink), raised, total


@triton.jit
def _mean(acc, total, v_scale, head):
    """The weighted mean of values; zero for a row that saw no key."""
    total = tl.where(total > 0.0, total, 1.0)
    mean = acc / (total[:, None] if len(acc.shape) == 2 else total)
    if v_scale is not None:
        mean *= tl.load(v_scale + head)
    return mean


@triton.jit
def _load_queries(
    q, q_stride, begin, token, real, head,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, PADDED_D]: row m is token m // GROUP of the tile, query head m % GROUP of the group."""
    columns = tl.arange(0, PADDED_D)[None, :]
    heads = head * GROUP + tl.arange(0, token.shape[0]) % GROUP
    at = (begin + token).to(tl.int64) * q_stride + heads * D
    rows = _load_rows(q + at[:, None] + columns, real[:, None], columns, D, True)
    if SCALED and rows.dtype != tl.float32 and PADDED_D <= 128:
        # For an fp8 cache: its numbers are exact in float16, and one instruction converts two of them. Wider
        # heads take more registers so, and spill.
        bounded = tl.clamp(
            rows.to(tl.float32), -_HALF_MAX, _HALF_MAX, propagate_nan=tl.PropagateNan.ALL
        )
        rows = bounded.to(tl.float16)
    return rows


@triton.jit
def _store_mean(
    out, mean, begin, token, real, head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, mean.shape[1])[None, :]
    heads = head * GROUP + tl.arange(0, token.shape[0]) % GROUP
    at = ((begin + token).to(tl.int64) * (KV_HEADS * GROUP) + heads) * D
    tl.store(
        out + at[:, None] + columns,
        mean.to(out.dtype.element_ty),
        mask=real[:, None] & (columns < D),
    )


@triton.jit
def _merge_if_last(
    out, workspace, arrived, starts, lengths, v_scale, slots,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr, WINDOW: tl.constexpr,
    RECORD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a program of `split_kernel` does when its parts are written. Its scalars are read again: kept in
    registers through the loops, they would spill."""
    head, request, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    _, splits = _splits(tl.load(lengths + request), count, SPLIT, PER_LEVEL, WINDOW)
    if splits > 1 and share < splits:
        arrived += request * KV_HEADS + head
        tl.debug_barrier()  # every thread's part is written before one of them counts
        others = tl.minimum(splits, tl.num_programs(2)) - 1
        if tl.atomic_add(arrived, 1, sem="acq_rel") == others:
            tl.store(arrived, 0)
            row = tl.arange(0, ROWS)
            token = row // GROUP
            real = token < count
            columns = tl.arange(0, PADDED_D)[None, :]
            part = (request.to(tl.int64) * KV_HEADS + head) * slots
            record = workspace + (part * (QUERIES * GROUP) + row) * (D + RECORD)
            acc = tl.zeros([ROWS, PADDED_D], tl.float32)
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            for _ in tl.range(0, splits, loop_unroll_factor=4):
                inside = real[:, None] & (columns < D)
                more_acc = tl.load(record[:, None] + columns, mask=inside, other=0.0)
                more_peak = tl.load(record + D, mask=real, other=float("-inf"))
                more_total = tl.load(record + D + 1, mask=real, other=0.0)
                acc, peak, total = _merge(acc, peak, total, more_acc, more_peak, more_total)
                record += QUERIES * GROUP * (D + RECORD)
            mean = _mean(acc, total, v_scale, head)
            _store_mean(out, mean, begin, token, real, head, KV_HEADS, GROUP, D)


@triton.jit(
    do_not_specialize=["table_stride", "slots"],
    do_not_specialize_on_alignment=["table", "starts", "lengths", "arrived"],
)
def split_kernel(
    out, workspace, arrived, q, keys, values, table, starts, lengths, k_scale, v_scale,
    scale, cap, q_stride, table_stride, slots,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TMA: tl.constexpr, RECORD: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Requests of up to QUERIES query tokens. Grid: (kv_heads, requests, shares): programs with splits of
    different length are not dealt to multiprocessors in turn, and the longest come first.

    FUSED: the last of a request's and head's programs to end merges their parts. `arrived` counts them, from
    0 and back to 0. Which one it is changes no bit, for it reads all parts, its own too, in order.
    """
    head, request, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    length = tl.load(lengths + request)
    if count < 1 or count > QUERIES:
        return
    first_split, splits = _splits(length, count, SPLIT, PER_LEVEL, WINDOW)
    rows = tl.arange(0, BLOCK_M)
    token = rows // GROUP
    real = token < count
    positions = tl.minimum(length - count + token, length - 1)
    queries = _load_queries(
        q, q_stride, begin, token, real, head, GROUP, D, PADDED_D, k_scale is not None
    )
    if k_scale is not None:
        k_factor = tl.load(k_scale + head)
        if CAPPED:
            cap *= k_factor
        else:
            scale *= k_factor
    columns = tl.arange(0, PADDED_D)[None, :]
    for taken in range(share, splits, tl.num_programs(0)):
        slot = splits - 1 - taken  # the longest splits first
        acc, peak, total = _attend(
            queries, positions, length - count, length - 1,
            _split_start(first_split + slot, SPLIT, PER_LEVEL),
            _split_start(first_split + slot + 1, SPLIT, PER_LEVEL),
            keys, values, table + request * table_stride, head, scale, cap,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA,
        )  # fmt: skip
        if splits == 1:
            mean = _mean(acc, total, v_scale, head)
            _store_mean(out, mean, begin, token, real, head, KV_HEADS, GROUP, D)
        else:
            part = (request.to(tl.int64) * KV_HEADS + head) * slots + slot
            record = workspace + (part * (QUERIES * GROUP) + rows) * (D + RECORD)
            tl.store(record[:, None] + columns, acc, mask=real[:, None] & (columns < D))
            tl.store(record + D, peak, mask=real)
            tl.store(record + D + 1, total, mask=real)
    if FUSED:
        _merge_if_last(
            out, workspace, arrived, starts, lengths, v_scale, slots,
            QUERIES, KV_HEADS, GROUP, D, PADDED_D, SPLIT, PER_LEVEL, WINDOW, RECORD, ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["starts", "lengths"])
def merge_kernel(
    out, workspace, starts, lengths, v_scale, slots,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr, WINDOW: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Merges the parts of `split_kernel`. Grid: (q_heads, QUERIES, requests)."""
    q_head, token, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    length = tl.load(lengths + request)
    if count > QUERIES or token >= count:
        return
    _, splits = _splits(length, count, SPLIT, PER_LEVEL, WINDOW)
    if splits == 1:
        return
    head = q_head // GROUP
    columns = tl.arange(0, PADDED_D)
    part = (request.to(tl.int64) * KV_HEADS + head) * slots
    record = workspace + (part * QUERIES + token) * (GROUP * (D + RECORD))
    record += q_head % GROUP * (D + RECORD)
    acc = tl.zeros([PADDED_D], tl.float32)
    peak = float("-inf")
    total = 0.0
    for _ in tl.range(0, splits, loop_unroll_factor=4):
        more_acc = tl.load(record + columns, mask=columns < D, other=0.0)
        more_peak, more_total = tl.load(record + D), tl.load(record + D + 1)
        acc, peak, total = _merge(acc, peak, total, more_acc, more_peak, more_total)
        record += QUERIES * GROUP * (D + RECORD)
    mean = _mean(acc, total, v_scale, head)
    at = ((begin + token).to(tl.int64) * (KV_HEADS * GROUP) + q_head) * D
    tl.store(out + at + columns, mean.to(out.dtype.element_ty), mask=columns < D)


@triton.jit(
    do_not_specialize=["table_stride", "requests"],
    do_not_specialize_on_alignment=["table", "starts", "lengths"],
)
def tile_kernel(
    out, q, keys, values, table, starts, lengths, k_scale, v_scale,
    scale, cap, q_stride, table_stride, requests,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PER_LEVEL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TMA: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Requests of more than QUERIES query tokens. Grid: (tokens // BLOCK_Q + requests, kv_heads).

    Request r has the tiles from starts[r] // BLOCK_Q + r up to the first one of the next request: as many
    as its tokens need, or one more.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # the ends of prompts first: they see most
    head = tl.program_id(1)
    low, high = 0, requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts + middle) // BLOCK_Q + middle <= index:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(starts + low)
    count = tl.load(starts + low + 1) - begin
    offset = (index - begin // BLOCK_Q - low) * BLOCK_Q
    if count <= QUERIES or offset >= count:
        return
    length = tl.load(lengths + low)
    first = length - count + offset
    last = tl.minimum(first + BLOCK_Q, length) - 1
    rows = tl.arange(0, BLOCK_M)
    token = offset + rows // GROUP
    real = (token < count) & (rows < BLOCK_Q * GROUP)
    positions = tl.minimum(length - count + token, last)
    queries = _load_queries(
        q, q_stride, begin, token, real, head, GROUP, D, PADDED_D, k_scale is not None
    )
    if k_scale is not None:
        k_factor = tl.load(k_scale + head)
        if CAPPED:
            cap *= k_factor
        else:
            scale *= k_factor
    table += low * table_stride
    if MERGED:
        acc = tl.zeros(queries.shape, tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        first_split, splits = _splits(last + 1, last + 1 - first, SPLIT, PER_LEVEL, WINDOW)
        for split in range(first_split, first_split + splits):
            more_acc, more_peak, more_total = _attend(
                queries, positions, first, last,
                _split_start(split, SPLIT, PER_LEVEL), _split_start(split + 1, SPLIT, PER_LEVEL),
                keys, values, table, head, scale, cap,
                KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA,
            )  # fmt: skip
            acc, peak, total = _merge(acc, peak, total, more_acc, more_peak, more_total)
    else:
        acc, peak, total = _attend(
            queries, positions, first, last, 0, last + 1,
            keys, values, table, head, scale, cap,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, CAPPED, TMA,
        )  # fmt: skip
    mean = _mean(acc, total, v_scale, head)
    _store_mean(out, mean, begin, token, real, head, KV_HEADS, GROUP, D)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    max_query_len: int,
    min_query_len: int = 1,
    decode_query_len: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    invariant: bool = False,
    out: Tensor,
    workspace: Tensor,
    arrived: Tensor | None = None,
) -> None:
    """`Kernels.paged_attention` of kernels/base.py, with the cache's layout above.

    q: [T, q_heads, D], heads dense, any token stride. k_cache, v_cache: [num_blocks, kv_heads,
    block_size, D] in q's dtype, or in float8_e4m3fn with k_scale, v_scale: [kv_heads] float32 (a stored
    value times its scale is the value). block_table: [B, max_blocks] int32, rows dense.
    query_start_loc: [B + 1], seq_lens: [B], int32. out: like q, contiguous. workspace: float32, at
    least `workspace_floats` long; its contents are not used afterwards. arrived: zeros, int32, one for
    each of the requests' key heads, and zeros again afterwards; without it a second kernel merges splits.

    max_query_len, min_query_len: bounds that the host knows for the query tokens of a request. A step
    that only decodes launches no tiles, one with only prompts no splits. decode_query_len: requests
    with at most this many query tokens use splits: one, and one more for each draft token. It must be
    the same in all calls whose results must agree.

    A request without query tokens is skipped. The rows of one with seq_lens 0 are set to zero. Rows
    from query_start_loc[B] on are not written. Contents are not checked: they are on the device.
    """
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    requests, max_blocks = block_table.shape
    tokens, q_heads = q.shape[:2]
    group = q_heads // kv_heads
    _check(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale, v_scale, out)
    require(
        scale > 0 and window >= 0 and softcap >= 0, "scale must be positive; window, softcap >= 0"
    )
    if requests == 0 or tokens == 0:
        return
    split_tile = _tile(k_cache, group, "invariant" if invariant else "decode")
    block_m = max(split_tile.block_m, triton.next_power_of_2(group * decode_query_len))
    slots = _slots(max_blocks * block_size, window, decode_query_len, split_tile)
    need = requests * slots * decode_query_len * q_heads * (head_dim + RECORD)
    if workspace.dtype is not torch.float32 or workspace.numel() < need:
        raise KernelArgumentError(
            f"workspace is {workspace.dtype} {workspace.numel()}; need {need} floats"
        )
    if arrived is not None:
        require(
            arrived.dtype is torch.int32 and arrived.numel() >= requests * kv_heads,
            f"arrived is {arrived.dtype} {arrived.numel()}; need {requests * kv_heads} int32",
        )
    # Scores are in units of log 2. With a cap, `cap` first scales them to twice the argument of tanh.
    cap = 2 * LOG2_E * scale / softcap if softcap else 0.0
    scale = LOG2_E * (softcap or scale)
    step = (
        block_table, query_start_loc, seq_lens, k_scale, v_scale,
        scale, cap, q.stride(0), block_table.stride(0),
    )  # fmt: skip
    shape = {
        "QUERIES": decode_query_len,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": head_dim,
        "PADDED_D": _padded(head_dim),
        "SPLIT": split_tile.split,
        "PER_LEVEL": UNIFORM if window else split_tile.per_level,
        "WINDOW": window,
    }
    walk = {"BLOCK_SIZE": block_size, "CAPPED": softcap > 0}
    if max_query_len > decode_query_len:
        choice = split_tile if invariant else _tile(k_cache, group, "prefill")
        rows = max(choice.block_m, triton.next_power_of_2(group))
        tile_kernel[(tokens // (rows // group) + requests, kv_heads)](
            out, q, *_operands(k_cache, v_cache, choice), *step, requests,
            **shape, **walk, BLOCK_M=rows, BLOCK_N=choice.block_n, TMA=choice.tma, MERGED=invariant,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
    if min_query_len > decode_query_len:
        return
    fused = split_tile.fused and slots > 1 and arrived is not None
    split_kernel[(kv_heads, requests, _shares(slots, requests * kv_heads))](
        out, workspace, arrived if fused else seq_lens, q, *_operands(k_cache, v_cache, split_tile),
        *step, slots,
        **shape, **walk, BLOCK_M=block_m, BLOCK_N=split_tile.block_n, TMA=split_tile.tma, RECORD=RECORD,
        FUSED=fused, ROWS=triton.next_power_of_2(decode_query_len * group), num_warps=split_tile.warps,
        num_stages=split_tile.stages,
    )  # fmt: skip
    if slots > 1 and not fused:
        merge_kernel[(q_heads, decode_query_len, requests)](
            out, workspace, query_start_loc, seq_lens, v_scale, slots,
            **shape, RECORD=RECORD, num_warps=1,
        )  # fmt: skip


def workspace_floats(
    k_cache: Tensor,
    *,
    q_heads: int,
    max_requests: int,
    max_len: int,
    window: int = 0,
    decode_query_len: int = 1,
    invariant: bool = False,
) -> int:
    """The size of the workspace of `paged_attention`, for at most this many requests and keys of each.

    Llama-3.1-8B, 256 requests: 99 MiB (as bytes) for 8,192 keys, 334 MiB for 131,072.
    """
    kv_heads, _, head_dim = k_cache.shape[1:]
    choice = _tile(k_cache, q_heads // kv_heads, "invariant" if invariant else "decode")
    slots = _slots(max_len, window, decode_query_len, choice)
    return max_requests * slots * decode_query_len * q_heads * (head_dim + RECORD)


def _shares(slots: int, heads: int) -> int:
    """Programs for the splits of one request and head, of `heads` requests times heads."""
    return min(slots, max(MIN_SHARES, PROGRAMS // heads))


def _slots(max_len: int, window: int, queries: int, tile: Tile) -> int:
    """The largest number of splits that one request's query tokens see: `_splits` on the host."""
    split, per_level = tile.split, tile.per_level
    if window:
        return min(-(-max_len // split), -(-(window + queries - 1) // split) + 1)
    level = ((max_len - 1) // (split * per_level) + 1).bit_length() - 1
    past = max_len - split * per_level * ((1 << level) - 1)
    return level * per_level + -(-past // (split << level))


def _operands(k_cache: Tensor, v_cache: Tensor, choice: Tile) -> list[Tensor | TensorDescriptor]:
    """The caches as arguments of kernels: pointers, or descriptors of a tile for the copy engine (TMA)."""
    if not choice.tma:
        return [k_cache, v_cache]
    head_dim = k_cache.shape[3]
    box = [choice.block_n, _padded(head_dim)]
    rows = k_cache.numel() // head_dim
    return [TensorDescriptor(x, [rows, head_dim], [head_dim, 1], box) for x in (k_cache, v_cache)]


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tile(k_cache: Tensor, group: int, regime: Regime) -> Tile:
    _, _, block_size, head_dim = k_cache.shape
    return tile(Key(architecture(), head_dim, group, block_size, k_cache.dtype, regime))


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Builds messages only on failure: this runs for every layer of a step without a graph."""
    _, q_heads, head_dim = q.shape
    _, kv_heads, block_size, cache_head_dim = k_cache.shape
    requests = block_table.shape[0]
    if q.dtype not in FLOATS or q.stride()[1:] != (head_dim, 1) or q_heads % kv_heads:
        raise KernelArgumentError(
            f"q is {q.dtype} {tuple(q.shape)} with strides {q.stride()}; need dense heads, a multiple of "
            f"{kv_heads}, in float32, bfloat16 or float16"
        )
    if out.dtype is not q.dtype or out.shape != q.shape or not out.is_contiguous():
        raise KernelArgumentError(
            f"out is {out.dtype} {tuple(out.shape)}; need contiguous {q.dtype} {tuple(q.shape)}"
        )
    if (
        k_cache.shape != v_cache.shape
        or not (k_cache.is_contiguous() and v_cache.is_contiguous())
        or cache_head_dim != head_dim
        or block_size not in (16, 32, 64, 128)
    ):
        raise KernelArgumentError(
            f"k_cache is {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; need both contiguous, "
            f"[num_blocks, kv_heads, 16 or 32 or 64 or 128, {head_dim}]"
        )
    fp8 = k_cache.dtype is torch.float8_e4m3fn
    if k_cache.dtype is not v_cache.dtype or not (fp8 or k_cache.dtype is q.dtype):
        raise KernelArgumentError(
            f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; need {q.dtype} or float8_e4m3fn"
        )
    if fp8 and 0 < architecture() < 89:
        raise KernelArgumentError(
            f"sm_{architecture()} has no float8_e4m3fn; use a cache of q's dtype"
        )
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scales is not None) != fp8:
            raise KernelArgumentError(f"{name} goes with a float8_e4m3fn cache, and only with one")
        if scales is not None and (scales.dtype, scales.shape) != (torch.float32, (kv_heads,)):
            raise KernelArgumentError(
                f"{name} is {scales.dtype} {tuple(scales.shape)}; need float32 ({kv_heads},)"
            )
    if (
        {block_table.dtype, query_start_loc.dtype, seq_lens.dtype} != {torch.int32}
        or block_table.stride(1) != 1
        or query_start_loc.shape != (requests + 1,)
        or seq_lens.shape != (requests,)
    ):
        raise KernelArgumentError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}, query_start_loc "
            f"{query_start_loc.dtype} {tuple(query_start_loc.shape)}, seq_lens {seq_lens.dtype} "
            f"{tuple(seq_lens.shape)}; need int32 [B, max_blocks], [B + 1] and [B]"
        )

"""The state of all blocks in a compact form, to be drawn.

Reading it costs time between two steps: about 0.1 us for each block that a request holds, and more if the
pool's objects do not fit the processor's cache. So beyond `MOST_CELLS` blocks there is no cell for each: then
the counts of the pool and of each request have to do, which do not depend on the pool's size.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from quire.kvcache.block import NULL_BLOCK_ID
from quire.kvcache.manager import KVCacheManager
from quire.messages.state import CELL_CACHED, CELL_HELD, CELL_OWNER, CELL_SHARED, BlockMap

MOST_CELLS = 16_384


def block_map(kv: KVCacheManager, holders: Sequence[int]) -> BlockMap:
    """holders: request ids. Those without blocks are allowed."""
    pool = kv.pool
    return BlockMap(
        num_blocks=pool.num_usable,
        block_size=kv.block_size,
        num_free=pool.num_free,
        num_cached=pool.num_cached,
        num_shared=pool.num_shared,
        cells=_cells(kv, holders) if pool.num_usable <= MOST_CELLS else b"",
    )


def _cells(kv: KVCacheManager, holders: Sequence[int]) -> bytes:
    cells = array(
        "H",
        [
            CELL_HELD if block.ref_count else CELL_CACHED if block.content is not None else 0
            for block in kv.pool.blocks
        ],
    )
    owned = list(enumerate(holders[:CELL_OWNER], 1))
    for owner, request_id in reversed(owned):  # so that the first stays
        table = kv.tables.get(request_id)
        for blocks in () if table is None else table.blocks:
            for block in blocks:
                cells[block.block_id] = owner if block.ref_count < 2 else owner | CELL_SHARED
    if sys.byteorder == "big":
        cells.byteswap()
    return cells[NULL_BLOCK_ID + 1 :].tobytes()


def num_shared_blocks(kv: KVCacheManager, request_id: int) -> int:
    """How many of the request's blocks, in the first group, others hold too. They are the first ones, so it
    is found by bisection; behind a sliding window that is not always so, and this is a lower bound."""
    table = kv.tables[request_id]
    blocks, start = table.blocks[0], table.first[0]
    low, high = start, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if blocks[middle].ref_count > 1:
            low = middle + 1
        else:
            high = middle
    return low - start

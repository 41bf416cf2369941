"""The map of blocks says of each what the pool knows."""

from __future__ import annotations

from array import array

import pytest

from quire.kvcache import CacheKey, KVCacheManager, block_map
from quire.kvcache.block_map import num_shared_blocks
from quire.messages.state import CELL_CACHED, CELL_HELD, CELL_OWNER, CELL_SHARED

BS = 4
PLAIN = CacheKey()


def run(kv: KVCacheManager, request_id: int, tokens: list[int]) -> None:
    match = kv.match_prefix(request_id, tokens, PLAIN, 1)
    kv.admit(request_id, match, PLAIN, len(tokens))
    kv.register(request_id, tokens, len(tokens), 1)


def cells(kv: KVCacheManager, *holders: int) -> list[int]:
    """By block id from 1 on."""
    found = array("H")
    found.frombytes(block_map.block_map(kv, holders).cells)
    return found.tolist()


def test_each_block_has_its_holder_and_state() -> None:
    kv = KVCacheManager(12, BS, enable_prefix_caching=True)
    run(kv, 7, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    run(kv, 8, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0])
    run(kv, 9, [5] * 5)
    kv.release(9)
    held = kv.pool.allocate(1)
    found = cells(kv, 7, 8)
    first, second = (kv.block_ids(request_id) for request_id in (7, 8))
    assert first[:2] == second[:2]
    for block_id in first[:2]:
        assert found[block_id - 1] == CELL_SHARED | 1, "the first that holds it"
    assert (found[first[2] - 1], found[second[2] - 1]) == (1, 2)
    assert found[held[0].block_id - 1] == CELL_HELD
    assert found.count(CELL_CACHED) == 1 and found.count(0) == 11 - 4 - 1 - 1
    shown = block_map.block_map(kv, (7, 8))
    assert (shown.num_blocks, shown.num_free, shown.num_shared) == (11, 6, 2)
    assert cells(kv, 8)[first[2] - 1] == CELL_HELD, "its holder is not in the list"
    assert cells(kv, 8)[second[2] - 1] == 1


def test_holders_without_blocks_and_too_many_of_them() -> None:
    kv = KVCacheManager(12, BS, enable_prefix_caching=True)
    run(kv, 5, [1] * 5)
    ids = [block_id - 1 for block_id in kv.block_ids(5)]
    assert [cells(kv, 1, 2, 5)[i] for i in ids] == [3, 3]
    holders = [*range(10_000, 10_000 + CELL_OWNER), 5]
    assert [cells(kv, *holders)[i] for i in ids] == [CELL_HELD, CELL_HELD]


def test_a_large_pool_has_counts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = KVCacheManager(12, BS, enable_prefix_caching=True)
    run(kv, 5, [1] * 5)
    monkeypatch.setattr(block_map, "MOST_CELLS", 10)
    shown = block_map.block_map(kv, (5,))
    assert shown.cells == b"" and (shown.num_blocks, shown.num_free) == (11, 9)


@pytest.mark.parametrize("shared", [0, 1, 3, 4])
def test_shared_blocks_are_counted_by_bisection(shared: int) -> None:
    kv = KVCacheManager(20, BS, enable_prefix_caching=True)
    prompt = list(range(17))
    run(kv, 1, prompt)
    assert num_shared_blocks(kv, 1) == 0
    run(kv, 2, [*prompt[: shared * BS], 99, 98, 97, 96, 95])
    assert num_shared_blocks(kv, 1) == num_shared_blocks(kv, 2) == kv.num_shared == shared


def test_behind_a_window_no_block_is_counted() -> None:
    kv = KVCacheManager(40, BS, enable_prefix_caching=True, windows=(8,), max_row_tokens=8)
    tokens = list(range(32))
    kv.admit(1, kv.no_match(), PLAIN, len(tokens))
    kv.slide(1, 24)
    assert kv.tables[1].first[0] > 0
    assert num_shared_blocks(kv, 1) == 0
    assert cells(kv, 1).count(1) == len(kv.block_ids(1)) - kv.tables[1].first[0]

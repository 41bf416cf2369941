"""Groups of layers over one pool: what a window gives back, what a hit needs of each group, what is held."""

from __future__ import annotations

import pytest

from quire.kv_layout import group_layers
from quire.kvcache import BlockPool, CacheKey, KVCacheManager, manager

BS = 4
PLAIN = CacheKey()


def make(*windows: int | None, num_blocks: int = 200, row: int = 8, caching: bool = True):
    return KVCacheManager(
        num_blocks, BS, enable_prefix_caching=caching, windows=windows, max_row_tokens=row
    )


def run(
    kv: KVCacheManager, request_id: int, tokens: list[int], *, step: int = 1, row: int = 8
) -> tuple[int, int]:
    """Admit a request, compute all of its tokens in rows. Returns how many were found, and the next step."""
    match = kv.match_prefix(request_id, tokens, PLAIN, step)
    computed = match.num_tokens
    assert kv.blocks_needed(match, len(tokens)) <= kv.num_free
    reach = min(computed + row, len(tokens))
    kv.admit(request_id, match, PLAIN, reach)
    kv.register(request_id, tokens, reach, step)
    while reach < len(tokens):
        kv.check_invariants()
        step, computed = step + 1, reach
        kv.slide(request_id, computed)
        reach = min(computed + row, len(tokens))
        assert kv.grow(request_id, reach) is not None
        kv.register(request_id, tokens, reach, step)
    kv.slide(request_id, len(tokens))
    kv.check_invariants()
    return match.num_tokens, step + 1


def held(kv: KVCacheManager, request_id: int) -> list[int]:
    """By group: how many blocks, the null block apart."""
    return [
        sum(block_id != 0 for block_id in kv.block_ids(request_id, group))
        for group in range(len(kv.windows))
    ]


def test_a_window_gives_back_what_is_behind_it() -> None:
    kv = make(None, 6)
    run(kv, 1, list(range(40)))
    # Token 40 reads 35 to 39 and itself: blocks 8 and 9.
    assert held(kv, 1) == [10, 2]
    assert kv.block_ids(1, 1)[:8] == [0] * 8 and 0 not in kv.block_ids(1, 0)
    assert kv.num_free == kv.num_usable - 12
    kv.release(1)
    assert kv.num_free == kv.num_usable


def test_no_more_is_held_than_was_asked_for() -> None:
    kv = make(None, 6, 9)
    most = kv.blocks_for(100)
    assert most == 25 + 4 + 5
    for row in range(1, 9):
        tokens = [row] * 100
        kv.admit(row, kv.no_match(), PLAIN, row)
        for reach in range(row, 100, row):
            kv.slide(row, reach)
            assert kv.grow(row, min(100, reach + row)) is not None
            assert sum(held(kv, row)) <= most
            kv.register(row, tokens, min(100, reach + row), 1)
            kv.check_invariants()
        kv.release(row)


def test_a_hit_needs_what_the_next_token_reads_of_each_group() -> None:
    kv = make(None, 6)
    tokens = list(range(40))
    _, step = run(kv, 1, tokens)
    kv.release(1)
    assert run(kv, 2, [*tokens, 7], step=step)[0] == 40
    assert kv.block_ids(2, 1)[:8] == [0] * 8
    kv.release(2)
    # Its blocks behind the window are still cached, so shorter prefixes are found too.
    assert run(kv, 3, [*tokens[:21], 7, 7, 7], step=step + 9)[0] == 20


def evict(kv: KVCacheManager, request_id: int, group: int, index: int) -> None:
    """Forget one block that nobody holds."""
    content = kv.tables[request_id].contents[index]
    block = content.blocks[group]
    kv.release(request_id)
    assert block is not None and block.ref_count == 0
    kv.pool._forget(block)
    kv.check_invariants()


@pytest.mark.parametrize(
    ("group", "index", "found"),
    [
        (0, 0, 0),  # full attention needs all
        (0, 7, 28),
        (1, 8, 32),  # 35 to 39 would be read, so 8 and 9 are needed; before 32 27 to 31 are there
        (1, 9, 36),
        (1, 7, 40),
        (2, 5, 20),  # 40 needs 29 to 39: 7, 8, 9; and so on down
        (2, 7, 28),
    ],
)
def test_what_is_missing_makes_a_hit_shorter(group: int, index: int, found: int) -> None:
    kv = make(None, 6, 12)
    tokens = list(range(40))
    _, step = run(kv, 1, tokens)
    evict(kv, 1, group, index)
    if (group, index) == (2, 5):
        assert kv.match_prefix(2, [*tokens, 7], PLAIN, step).num_tokens == 40
        assert kv.match_prefix(3, [*tokens[:33], 7], PLAIN, step).num_tokens == 20
    else:
        assert kv.match_prefix(2, [*tokens, 7], PLAIN, step).num_tokens == found


def test_groups_shorten_a_hit_in_turn() -> None:
    """The second window cannot use where the first one ends, nor the first where the second one then does."""
    kv = make(None, 6, 12)
    tokens = list(range(60))
    _, step = run(kv, 1, tokens)
    chain = kv.tables[1].contents
    kv.release(1)
    for group, index in ((1, 13), (2, 11), (1, 9)):
        kv.pool._forget(chain[index].blocks[group])
    # 15 blocks: group 1 lacks 13, so 13; group 2 lacks 11 of 10 to 12, so 11; group 1 lacks 9 of 9, 10: so 9.
    assert kv.match_prefix(2, [*tokens, 7], PLAIN, step).num_tokens == 36


def test_with_windows_only_what_is_left_proves_what_was_before() -> None:
    kv = make(6, num_blocks=8)
    tokens = list(range(80))
    _, step = run(kv, 1, tokens)
    kv.release(1)
    run(kv, 2, [99] * 9, step=step)  # takes five of the seven blocks
    kv.release(2)
    assert sum(content.blocks[0] is not None for content in kv.pool._cached.values()) < 10
    assert run(kv, 3, [*tokens, 7], step=step + 9)[0] == 80
    kv.release(3)
    run(kv, 4, [*tokens[:79], 98, 98], step=step + 20)
    assert len(kv.tables[4].contents) == 20


def test_with_windows_only_a_collision_does_not_serve_foreign_kv(monkeypatch) -> None:
    """The hash forgets what was before the last block."""
    monkeypatch.setattr(manager, "hash_block", lambda parent, tokens: bytes(tokens))
    kv = make(6)
    _, step = run(kv, 1, [1] * 20 + [2, 3, 4, 5, 6, 7, 8, 9])
    kv.release(1)
    kv.pool.check_invariants({})
    assert kv.match_prefix(2, [9] * 20 + [2, 3, 4, 5, 6, 7, 8, 9, 0], PLAIN, step).num_tokens == 0
    assert kv.match_prefix(3, [1] * 20 + [2, 3, 4, 5, 6, 7, 8, 9, 0], PLAIN, step).num_tokens == 28
    other = kv.match_prefix(4, [1] * 20 + [2, 3, 4, 5, 6, 7, 8, 9, 0], CacheKey("a"), step)
    assert other.num_tokens == 0


def test_a_tail_is_copied_in_every_group() -> None:
    kv = KVCacheManager(60, 8, enable_prefix_caching=True, windows=(None, 9), max_row_tokens=8)
    tokens = [1] * 16 + [2, 3, 4, 5, 6]
    _, step = run(kv, 1, tokens)
    kv.release(1, tokens, step_id=step)
    match = kv.match_prefix(2, [*tokens, 7], PLAIN, step + 1)
    assert match.num_tokens == 21 and len(match.tails) == 2
    growth = kv.admit(2, match, PLAIN, 22)
    new = [kv.block_ids(2, group)[2] for group in (0, 1)]
    assert growth.copies == [(match.tails[0].block_id, new[0]), (match.tails[1].block_id, new[1])]
    kv.check_invariants()
    assert kv.without_tails(match).num_tokens == 16
    kv.pool._forget(match.tails[1])
    assert kv.match_prefix(3, [*tokens, 7], PLAIN, step + 1).num_tokens == 16
    kv.check_invariants()


def test_a_fork_shares_the_window_unless_its_leader_is_far_ahead() -> None:
    kv = make(None, 6)
    tokens = list(range(30))
    run(kv, 1, tokens)
    match = kv.match_fork(1, 29, 9)
    assert match is not None and match.num_tokens == 29 and len(match.tails) == 2
    growth = kv.admit(2, match, PLAIN, 30)
    assert len(growth.copies) == 2 and kv.block_ids(2, 1)[:6] == [0] * 6
    kv.check_invariants()
    kv.slide(1, 29)
    assert kv.match_fork(1, 29, 9) is not None
    assert kv.grow(1, 60) is not None
    kv.slide(1, 50)
    assert kv.match_fork(1, 29, 9) is None


def test_without_the_copy_a_match_may_lack_what_the_window_reads() -> None:
    kv = KVCacheManager(60, 8, enable_prefix_caching=True, windows=(None, 5), max_row_tokens=8)
    tokens = [1] * 16 + [2, 3, 4, 5, 6]
    _, step = run(kv, 1, tokens)
    match = kv.match_fork(1, 21, step)
    assert match is not None and match.num_tokens == 21
    assert kv.block_ids(1, 1)[:2] == [0, 0]
    assert kv.without_tails(match).num_tokens == 0, "token 16 reads 12 to 15"


def test_what_a_long_context_holds() -> None:
    """Gemma 3 27B: five layers of six with a window of 1,024, here at 32,768 tokens."""
    layout = group_layers(([1024] * 5 + [None]) * 10 + [1024] * 2, 1)
    kv = KVCacheManager(
        10_000, 16, enable_prefix_caching=False, windows=layout.windows, max_row_tokens=2048
    )
    length = 32_768
    kv.admit(1, kv.no_match(), PLAIN, 2048)
    for computed in range(2048, length, 2048):
        kv.slide(1, computed)
        assert kv.grow(1, computed + 2048) is not None
        assert sum(held(kv, 1)) <= kv.blocks_for(computed + 2048)
    kv.slide(1, length)
    assert kv.grow(1, length + 1) is not None
    assert held(kv, 1) == [2049] + [65] * 6
    pages = sum(held(kv, 1))
    layer_tokens = pages * layout.layers_per_page * 16
    exact = 10 * length + 52 * 1024
    assert exact <= layer_tokens <= 1.04 * exact
    assert 62 * length / layer_tokens > 5.1


def test_a_long_chain_of_contents_is_dropped_without_recursion() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    content = PLAIN
    for index in range(100_000):
        pool.reset_cache()
        content = pool.register([block], bytes(str(index), "ascii"), content, (index,), 1)
    assert len(content.chain()) == 100_000
    pool.reset_cache()
    content = None
    assert pool.lookup(b"5", PLAIN, (5,)) is None

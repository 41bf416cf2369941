"""The pool and the tables: what a hit proves, what eviction takes first, what copies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quire.kvcache import BlockPool, CacheKey, KVCacheManager, manager

BS = 4
PLAIN = CacheKey()


def make(num_blocks: int = 20, *, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, BS, enable_prefix_caching=caching)


def run(kv: KVCacheManager, request_id: int, tokens: list[int], *, key=PLAIN, step: int = 1) -> int:
    """Admit a request with all its tokens; returns how many were cached."""
    match = kv.match_prefix(request_id, tokens, key, step)
    assert kv.blocks_needed(match, len(tokens)) <= kv.num_free
    kv.admit(request_id, match, key, len(tokens))
    kv.register(request_id, tokens, len(tokens), step)
    kv.check_invariants()
    return match.num_tokens


def test_a_prefix_is_found_after_its_owner_is_gone():
    kv = make()
    run(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    kv.release(1)
    assert run(kv, 2, [1, 2, 3, 4, 5, 6, 7, 8, 0], step=2) == 8
    assert kv.pool.num_free == kv.pool.num_usable - 3


def test_sharing_counts_references():
    kv = make()
    run(kv, 1, list(range(10)))
    run(kv, 2, list(range(9)))
    assert kv.block_ids(1)[:2] == kv.block_ids(2)[:2]
    assert kv.pool.num_shared == 2
    kv.release(1)
    assert kv.pool.num_shared == 0
    kv.check_invariants()


def test_a_wholly_cached_prompt_recomputes_one_token_in_a_copied_block():
    kv = make()
    run(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8], step=1)
    match = kv.match_prefix(2, [1, 2, 3, 4, 5, 6, 7, 8], PLAIN, 2)
    assert match.num_tokens == 7 and match.tails
    growth = kv.admit(2, match, PLAIN, 8)
    assert growth.copies == [(kv.block_ids(1)[1], kv.block_ids(2)[1])]
    assert kv.block_ids(1)[1] != kv.block_ids(2)[1]
    kv.check_invariants()


def test_a_block_of_this_very_step_is_shared_but_not_copied():
    kv = make()
    run(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8], step=5)
    match = kv.match_prefix(2, [1, 2, 3, 4, 5, 6, 7, 8], PLAIN, 5)
    assert match.num_tokens == 4 and not match.tails


def test_salts_share_nothing():
    kv = make()
    run(kv, 1, list(range(8)), key=CacheKey("a"))
    assert run(kv, 2, list(range(9)), key=CacheKey("b")) == 0
    assert run(kv, 3, list(range(9))) == 0
    assert run(kv, 4, list(range(9)), key=CacheKey("a"), step=2) == 8


def test_adapters_share_nothing_and_are_not_salts():
    keys = [
        CacheKey(),
        CacheKey("a"),
        CacheKey(None, "a"),
        CacheKey("a", "a"),
        CacheKey("", "aa"),
        CacheKey("aa"),
    ]
    assert len({key.root_hash for key in keys}) == len(keys)
    kv = make(num_blocks=40)
    for request_id, key in enumerate(keys):
        assert run(kv, request_id, list(range(9)), key=key) == 0


def test_a_hash_collision_never_serves_foreign_kv(monkeypatch):
    # All blocks collide; only verification stands between the requests.
    monkeypatch.setattr(manager, "hash_block", lambda parent, tokens: b"same")
    kv = make()
    run(kv, 1, [1, 2, 3, 4, 9])
    assert run(kv, 2, [5, 6, 7, 8, 9], step=2) == 0


def test_equal_tokens_after_different_prefixes_do_not_match(monkeypatch):
    # The second block's hash ignores its parent, as a broken chain would.
    monkeypatch.setattr(manager, "hash_block", lambda parent, tokens: bytes(tokens))
    kv = make()
    run(kv, 1, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    assert run(kv, 2, [2, 2, 2, 2, 5, 5, 5, 5, 0], step=2) == 0
    assert run(kv, 3, [2, 2, 2, 2, 5, 5, 5, 5, 0], step=3) == 8


def test_the_head_of_a_prefix_outlives_its_tail():
    kv = make(num_blocks=1 + 4)
    run(kv, 1, list(range(12)))
    kv.release(1)
    run(kv, 2, [50, 51, 52, 53, 54])  # takes the empty block and evicts one: the tail
    assert kv.match_prefix(3, list(range(13)), PLAIN, 2).num_tokens == 8


def test_blocks_without_cached_content_are_reused_first():
    kv = make(num_blocks=1 + 4)
    run(kv, 1, list(range(8)))
    kv.release(1)
    run(kv, 2, [90, 91])  # a partial block: never cached
    kv.release(2)
    run(kv, 3, [80, 81, 82, 83, 84])
    assert kv.match_prefix(4, list(range(9)), PLAIN, 2).num_tokens == 8


def test_least_recently_used_prefix_is_evicted_first():
    kv = make(num_blocks=1 + 3)
    for request_id, token in ((1, 10), (2, 20), (3, 30)):
        run(kv, request_id, [token] * 4)
        kv.release(request_id)
    run(kv, 4, [10] * 4 + [11], step=2)  # touches the first, evicts the second
    kv.release(4)
    found = {t: kv.match_prefix(100 + t, [t] * 5, PLAIN, 3).num_tokens for t in (10, 20, 30)}
    assert found == {10: 4, 20: 0, 30: 4}


def test_an_orphan_gives_way_to_new_content():
    pool = BlockPool(4)
    (parent, first, second) = pool.allocate(3)
    of_parent = pool.register([parent], b"p", PLAIN, (0,), 1)
    old = pool.register([first], b"h", of_parent, (1,), 1)
    pool.reset_cache()
    again = pool.register([parent], b"p", PLAIN, (0,), 1)
    new = pool.register([second], b"h", again, (1,), 1)
    assert old is not new and again is not of_parent
    assert pool.lookup(b"h", of_parent, (1,)) is None
    assert pool.lookup(b"h", again, (1,)) is new and new.blocks == [second]
    pool.check_invariants({block.block_id: 1 for block in (parent, first, second)})


def test_content_that_is_computed_again_under_a_new_parent_replaces_the_old():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    old = pool.register([first], b"h", CacheKey("a"), (1,), 1)
    new = pool.register([second], b"h", CacheKey("b"), (1,), 1)
    assert first.content is None and old.blocks == [None]
    assert pool.lookup(b"h", CacheKey("a"), (1,)) is None
    assert pool.lookup(b"h", CacheKey("b"), (1,)) is new
    pool.check_invariants({first.block_id: 1, second.block_id: 1})


def test_fork_shares_full_blocks_and_copies_the_partial_one():
    kv = make()
    tokens = list(range(10))
    run(kv, 1, tokens)
    match = kv.match_fork(1, 9, 2)
    growth = kv.admit(2, match, PLAIN, 10)
    kv.register(2, tokens, 10, 2)
    assert kv.block_ids(1)[:2] == kv.block_ids(2)[:2]
    assert growth.copies == [(kv.block_ids(1)[2], kv.block_ids(2)[2])]
    kv.check_invariants()


def test_a_fork_does_not_copy_what_its_leader_only_matched_in_this_step():
    kv = make()
    run(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8], step=5)  # step 5 computes both blocks
    assert run(kv, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9], step=5) == 8  # the leader shares them at once
    match = kv.match_fork(2, 7, 5)
    assert (match.num_tokens, match.tails) == (4, [])
    assert kv.match_fork(2, 7, 6).num_tokens == 7


def test_without_caching_nothing_is_found_and_forks_still_share():
    kv = make(caching=False)
    run(kv, 1, list(range(9)))
    assert run(kv, 2, list(range(9)), step=2) == 0
    match = kv.match_fork(1, 8, 2)
    kv.admit(3, match, PLAIN, 9)
    assert kv.block_ids(3)[:2] == kv.block_ids(1)[:2]
    kv.check_invariants()


def test_growth_that_does_not_fit_changes_nothing():
    kv = make(num_blocks=1 + 2)
    run(kv, 1, [1, 2, 3])
    assert kv.grow(1, 13) is None
    assert kv.block_ids(1) == kv.block_ids(1)[:1]
    kv.check_invariants()


def test_double_free_is_caught():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="double free"):
        pool.release([block])


def test_reset_forgets_content_but_not_tables():
    kv = make()
    run(kv, 1, list(range(9)))
    kv.pool.reset_cache()
    kv.check_invariants()
    assert kv.pool.num_cached == 0
    assert kv.match_prefix(2, list(range(9)), PLAIN, 2).num_tokens == 0
    assert kv.grow(1, 13) is not None


def test_what_a_request_left_in_its_last_block_is_found_and_copied():
    kv = KVCacheManager(11, 8, enable_prefix_caching=True)
    run(kv, 1, [1] * 8 + [2, 3, 4, 5, 6])
    kv.release(1, [1] * 8 + [2, 3, 4, 5, 6], step_id=1)
    left = [1] * 8 + [2, 3, 4, 5, 6]
    for rest, found in (
        ([2, 3, 4, 5, 6, 7], 5),
        ([2, 3, 4, 5, 6], 4),  # the last token is computed, to have something to sample from
        ([2, 3, 4, 5, 9, 9, 9, 9, 9], 4),
        ([2, 3, 4, 9, 9], 0),  # too few to be worth a copy
        ([9, 3, 4, 5, 6], 0),
    ):
        match = kv.match_prefix(100 + len(rest) + found, [1] * 8 + rest, PLAIN, 2)
        assert match.num_tokens == 8 + found and bool(match.tails) == (found > 0)
    assert kv.match_prefix(2, [*left, 7], PLAIN, 1).num_tokens == 8, (
        "not in the step that computes it"
    )
    assert kv.match_prefix(3, [*left, 7], CacheKey("salt"), 2).num_tokens == 0
    match = kv.match_prefix(4, [*left, 7], PLAIN, 2)
    growth = kv.admit(4, match, PLAIN, len(left) + 1)
    assert growth.copies == [(match.tails[0].block_id, kv.block_ids(4)[1])]
    kv.check_invariants()
    kv.pool.reset_cache()
    assert kv.match_prefix(5, [*left, 7], PLAIN, 3).num_tokens == 0
    kv.check_invariants()


def test_a_short_requests_tail_is_found_under_its_key_alone():
    kv = KVCacheManager(20, 8, enable_prefix_caching=True)
    run(kv, 1, [1, 2, 3, 4, 5], key=CacheKey("a"))
    kv.release(1, [1, 2, 3, 4, 5], step_id=1)
    assert kv.match_prefix(2, [1, 2, 3, 4, 5, 6], PLAIN, 2).num_tokens == 0
    assert kv.match_prefix(3, [1, 2, 3, 4, 5, 6], CacheKey("a"), 2).num_tokens == 5


def test_the_latest_tails_of_a_block_are_kept():
    kv = KVCacheManager(60, 8, enable_prefix_caching=True)
    for request_id in range(30):
        tokens = [request_id + 1] * 5
        run(kv, request_id, tokens)
        kv.release(request_id, tokens, step_id=1)
        kv.check_invariants()
    found = [kv.match_prefix(100 + i, [i + 1] * 6, PLAIN, 2).num_tokens for i in range(30)]
    assert found == [0] * 14 + [5] * 16


def test_a_tail_that_is_handed_out_is_forgotten():
    kv = KVCacheManager(3, 8, enable_prefix_caching=True)
    run(kv, 1, [7] * 5)
    kv.release(1, [7] * 5, step_id=1)
    run(kv, 2, list(range(10, 26)))  # takes both blocks
    assert kv.match_prefix(3, [7] * 6, PLAIN, 2).num_tokens == 0
    kv.check_invariants()


def test_importing_scheduler_and_kvcache_leaves_torch_out():
    code = "import sys, quire.scheduler, quire.kvcache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Block tables of requests over a `BlockPool`: prefix matches, growth, registration, release."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from quire.kv_layout import most_held
from quire.kvcache.block import Block, BlockContent, CacheKey, hash_block
from quire.kvcache.block_pool import BlockPool
from quire.kvcache.retention import Retention
from quire.kvcache.tables import Growth, PrefixMatch, Table, count_references, tail_first
from quire.placement import Placement

LEAST_COPIED = 4
"""Least number of tokens for which a tail is copied; fewer are computed in less time."""


class KVCacheManager:
    """Turns "this request will have KV for its first n tokens" into blocks.

    Layers are in groups, see `quire.kv_layout`. A request has a block table of each group, and all of them
    grow together. Block tables are append-only. Where a group's layers have a sliding window, blocks that
    no token still to be computed reads are given back, and the null block stands in their place.

    Full blocks are registered with the pool when their tokens are *scheduled*, not when computed: a request
    planned later in the same step may already share them, because every layer writes all of the step's KV
    before any of its attention reads. A block behind the window of a row's first token is not read by the
    step at all, and may be given to others in it.

    windows: of each group, None for full attention.
    max_row_tokens: most tokens that a row computes, which bounds what a group with a window holds.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        windows: Sequence[int | None] = (None,),
        max_row_tokens: int = 0,
        retention: Retention | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, num_groups=len(windows), retention=retention)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.windows = tuple(windows)
        self.max_row_tokens = max_row_tokens
        self.tables: dict[int, Table] = {}
        self._hashes: dict[int, list[bytes]] = {}
        self._full = [group for group, window in enumerate(windows) if window is None]
        self._sliding = [
            (group, window) for group, window in enumerate(windows) if window is not None
        ]
        assert max_row_tokens or not self._sliding
        self._most_held = [most_held(window, block_size, max_row_tokens) for window in windows]

    def blocks_for(self, num_tokens: int) -> int:
        """The most blocks that a request of this many tokens holds at a time."""
        return sum(self._at_a_time(-(-num_tokens // self.block_size)))

    def num_blocks_of(self, request_id: int) -> int:
        """The number of entries in each of its block tables."""
        return len(self.tables[request_id].blocks[0])

    def num_missing(self, request_id: int, num_tokens: int) -> int:
        """Blocks that it lacks to reach so many tokens. No more than it can hold at a time, but without
        counting on those that it will give back: others may hold them too."""
        missing = -(-num_tokens // self.block_size) - len(self.tables[request_id].blocks[0])
        return sum(self._at_a_time(missing)) if missing > 0 else 0

    def _at_a_time(self, count: int) -> Iterator[int]:
        """Of `count` blocks, how many each group can hold at a time."""
        return (count if most is None else min(count, most) for most in self._most_held)

    def num_shareable_tokens(self, request_id: int) -> int:
        """The number of its first tokens that other requests can find, those scheduled in this step
        included."""
        return len(self.tables[request_id].contents) * self.block_size

    def block_ids(self, request_id: int, group: int = 0) -> list[int]:
        return [block.block_id for block in self.tables[request_id].blocks[group]]

    def first_read(self, group: int, num_tokens: int) -> int:
        """Index of the first block that is read for the token after `num_tokens` others."""
        window = self.windows[group]
        return 0 if window is None else max(0, num_tokens - window + 1) // self.block_size

    # --- before admission -------------------------------------------------------------------------

    def no_match(self) -> PrefixMatch:
        return PrefixMatch(0, [[] for _ in self.windows])

    def match_prefix(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey, step_id: int
    ) -> PrefixMatch:
        """The longest cached prefix, at most all tokens but the last: that one must be computed, to
        have something to sample from. Takes no references."""
        if not self.enable_prefix_caching:
            return self.no_match()
        size = self.block_size
        chain = self.find_chain(request_id, token_ids, key)
        count = self._longest(chain, len(chain))
        if count * size == len(token_ids) and count:
            # Everything is cached: keep all but the last slot of the last block, by copying it, or
            # recompute it.
            last, count = chain[count - 1], count - 1
            if self._can_be_copied(last, step_id):
                match = self._match(chain[:count], len(token_ids) - 1, last)
                if match is not None:
                    return match
            count = self._longest(chain, count)
        else:
            parent = chain[count - 1] if count else key
            rest = token_ids[count * size : min((count + 1) * size, len(token_ids) - 1)]
            tail, more = self.pool.lookup_tail(parent, rest)
            if tail is not None and more >= LEAST_COPIED and self._can_be_copied(tail, step_id):
                match = self._match(chain[:count], count * size + more, tail)
                if match is not None:
                    return match
        match = self._match(chain[:count], count * size, None)
        assert match is not None, "_longest found all that is read"
        return match

    def find_chain(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey
    ) -> list[BlockContent]:
        """Contents of the first full blocks, verified, for as many as all groups with full attention have
        them."""
        hashes = self.hashes_of(request_id, token_ids, key)
        size = self.block_size
        number = len(token_ids) // size
        if not self._full:
            return self._find_last(hashes[:number], token_ids, key)
        several = len(self.windows) > 1  # else a cached content has its one block
        chain: list[BlockContent] = []
        parent: BlockContent | CacheKey = key
        for index in range(number):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            content = self.pool.lookup(hashes[index], parent, tokens)
            if content is None or (several and self._lacks(content)):
                break
            chain.append(content)
            parent = content
        return chain

    def _lacks(self, content: BlockContent) -> bool:
        return any(content.blocks[group] is None for group in self._full)

    def _find_last(
        self, hashes: Sequence[bytes], token_ids: Sequence[int], key: CacheKey
    ) -> list[BlockContent]:
        """The same where all groups have windows. Blocks behind them may be gone; the contents that are
        left know, and so prove, what was before them."""
        size = self.block_size
        for index in range(len(hashes) - 1, -1, -1):
            last = self.pool.get(hashes[index])
            if last is None:
                continue
            chain = last.chain()
            if chain[0].parent == key and len(chain) == index + 1:
                tokens = [token for content in chain for token in content.tokens]
                if tokens == list(token_ids[: (index + 1) * size]):
                    return chain
        return []

    def _longest(self, chain: Sequence[BlockContent], count: int) -> int:
        """The number of leading blocks, at most `count`, that can be reused: every group must have the blocks
        that the next token reads."""
        if not self._sliding:
            return count
        return self.longest(count, lambda group, index: chain[index].blocks[group] is not None)

    def longest(self, count: int, has: Callable[[int, int], bool]) -> int:
        """The number of leading blocks, at most `count`, after which all blocks that the next token reads in
        groups with windows are there: `has(group, index)`."""
        found = -1
        while found != count:
            found = count
            for group, _ in self._sliding:
                end = count
                for index in range(count - 1, -1, -1):
                    if index < self.first_read(group, end * self.block_size):
                        break
                    if not has(group, index):
                        end = index
                count = end
        return count

    def _match(
        self, contents: list[BlockContent], num_tokens: int, tail: BlockContent | None
    ) -> PrefixMatch | None:
        """Full blocks with these contents, and the tail; None if a group lacks a block that the next
        token reads."""
        blocks: list[list[Block]] = []
        for group in range(len(self.windows)):
            first = self.first_read(group, num_tokens)
            held = [content.blocks[group] for content in contents[first:]]
            found = [block for block in held if block is not None]
            if len(found) < len(held):
                return None
            blocks.append([self.pool.null_block] * min(first, len(contents)) + found)
        tails = [] if tail is None else [block for block in tail.blocks if block is not None]
        return PrefixMatch(num_tokens, blocks, contents, tails)

    def _can_be_copied(self, content: BlockContent, step_id: int) -> bool:
        return all(block is not None and _can_be_copied(block, step_id) for block in content.blocks)

    def match_fork(self, leader_id: int, num_tokens: int, step_id: int) -> PrefixMatch | None:
        """Share the first `num_tokens` tokens of a running request, all of which it counts as
        computed. Finer than `match_prefix`: the partial last block is taken over by copy. None if the leader
        has left them behind a window."""
        leader = self.tables[leader_id]
        full, rest = divmod(num_tokens, self.block_size)
        assert len(leader.blocks[0]) * self.block_size >= num_tokens
        tails = [table[full] for table in leader.blocks] if rest else []
        if not all(_can_be_copied(tail, step_id) for tail in tails):
            # A leader admitted in this step may itself have matched a block that the step computes.
            tails, num_tokens = [], full * self.block_size
        blocks = []
        for group, table in enumerate(leader.blocks):
            first = self.first_read(group, num_tokens)
            if first < leader.first[group]:
                return None
            blocks.append([self.pool.null_block] * min(first, full) + table[first:full])
        return PrefixMatch(num_tokens, blocks, leader.contents[:full], tails)

    def without_tails(self, match: PrefixMatch) -> PrefixMatch:
        """The match without the copied part, whose tokens are computed again."""
        full = len(match.blocks[0])
        for group, _ in self._sliding:
            first = self.first_read(group, full * self.block_size)
            if any(block is self.pool.null_block for block in match.blocks[group][first:]):
                return self.no_match()
        return PrefixMatch(full * self.block_size, match.blocks, match.contents)

    def blocks_needed(self, match: PrefixMatch, num_tokens: int) -> int:
        """The free blocks that the admission of a request with this match and `num_tokens` tokens needs."""
        count, null = -(-num_tokens // self.block_size), self.pool.null_block
        needed = 0
        for blocks, most in zip(match.blocks, self._most_held, strict=True):
            revived = sum(1 for block in blocks if block.ref_count == 0 and block is not null)
            own = count - len(blocks) + revived
            needed += own if most is None else min(own, most)
        # A tail has a reference while it is copied.
        return needed + sum(1 for block in match.tails if block.ref_count == 0)

    # --- while running ----------------------------------------------------------------------------

    def admit(self, request_id: int, match: PrefixMatch, key: CacheKey, num_tokens: int) -> Growth:
        """Create block tables that start with `match` and reach to `num_tokens` tokens."""
        assert request_id not in self.tables
        first = [
            min(self.first_read(group, match.num_tokens), len(blocks))
            for group, blocks in enumerate(match.blocks)
        ]
        for start, blocks in zip(first, match.blocks, strict=True):
            self.pool.acquire(blocks[start:])
        tables = [list(blocks) for blocks in match.blocks]
        full = len(tables[0])
        self.tables[request_id] = Table(
            key, tables, list(match.contents), first, self._slides_at(first)
        )
        # Tails must not be handed out as their own copies' destinations.
        self.pool.acquire(match.tails)
        growth = self.grow(request_id, max(num_tokens, match.num_tokens))
        assert growth is not None, "blocks_needed was not asked"
        copies = [
            (tail.block_id, table[full].block_id)
            for tail, table in zip(match.tails, tables, strict=False)
        ]
        self.pool.release(match.tails)
        return Growth(tuple(self.block_ids(request_id, g) for g in range(len(tables))), copies)

    def grow(self, request_id: int, num_tokens: int) -> Growth | None:
        """Extend the tables to hold `num_tokens` tokens; None, and no change, if blocks are lacking."""
        table = self.tables[request_id]
        missing = -(-num_tokens // self.block_size) - len(table.blocks[0])
        if missing <= 0:
            return _NO_GROWTH
        if missing * len(table.blocks) > self.pool.num_free:
            return None
        block_ids = []
        for blocks in table.blocks:
            new = self.pool.allocate(missing)
            blocks.extend(new)
            block_ids.append([block.block_id for block in new])
        return Growth(tuple(block_ids), [])

    def slide(self, request_id: int, num_computed: int) -> None:
        """Free the blocks that no token from `num_computed` on reads. They stay possible prefix hits."""
        table = self.tables[request_id]
        if num_computed < table.slides_at:
            return
        for group, _ in self._sliding:
            blocks, first = table.blocks[group], table.first[group]
            start = self.first_read(group, num_computed)
            self.pool.release(reversed(blocks[first:start]))
            blocks[first:start] = [self.pool.null_block] * (start - first)
            table.first[group] = start
        table.slides_at = self._slides_at(table.first)

    def _slides_at(self, first: Sequence[int]) -> int:
        """The number of computed tokens with which a group can free its first block."""
        return min(
            ((first[group] + 1) * self.block_size + window - 1 for group, window in self._sliding),
            default=sys.maxsize,
        )

    def register(
        self, request_id: int, token_ids: Sequence[int], num_tokens: int, step_id: int
    ) -> None:
        """Blocks filled by the first `num_tokens` tokens (computed or in this step) can be shared."""
        if not self.enable_prefix_caching:
            return
        table = self.tables[request_id]
        size = self.block_size
        full = num_tokens // size
        if full <= len(table.contents):
            return
        hashes = self.hashes_of(request_id, token_ids, table.key)
        for index in range(len(table.contents), full):
            content = self.pool.register(
                [blocks[index] for blocks in table.blocks],
                hashes[index],
                table.contents[-1] if table.contents else table.key,
                tuple(token_ids[index * size : (index + 1) * size]),
                step_id,
            )
            table.contents.append(content)

    def release(
        self, request_id: int, token_ids: Sequence[int] = (), *, step_id: int = 0,
        placement: Placement = Placement(),
    ) -> None:  # fmt: skip
        """Drop the request's references, tail first, so that its head is evicted last.

        token_ids: tokens whose KV is valid; the partial last block is cached as a tail.
        placement: says what is retained, and for whom.
        """
        table = self.tables.pop(request_id)
        if placement.retain:
            self.pool.retain(table.contents, placement)
        full = len(table.contents)
        tokens = tuple(token_ids[full * self.block_size : (full + 1) * self.block_size])
        if self.enable_prefix_caching and LEAST_COPIED <= len(tokens) < self.block_size:
            tails = [blocks[full] for blocks in table.blocks]
            if self.pool.null_block not in tails:
                hashes = self.hashes_of(request_id, token_ids, table.key)
                parent_hash = hashes[full - 1] if full else table.key.root_hash
                parent = table.contents[-1] if full else table.key
                self.pool.register_tail(
                    tails, hash_block(parent_hash, tokens), parent, tokens, step_id
                )
        self.pool.release(tail_first(table))

    def forget(self, request_id: int) -> None:
        """The request has ended: drop its hashes too."""
        self._hashes.pop(request_id, None)

    def hashes_of(self, request_id: int, token_ids: Sequence[int], key: CacheKey) -> list[bytes]:
        hashes = self._hashes.setdefault(request_id, [])
        size = self.block_size
        for index in range(len(hashes), len(token_ids) // size):
            parent = hashes[-1] if hashes else key.root_hash
            hashes.append(hash_block(parent, token_ids[index * size : (index + 1) * size]))
        return hashes

    # --- accounting -------------------------------------------------------------------------------

    @property
    def has_windows(self) -> bool:
        return bool(self._sliding)

    @property
    def usage(self) -> float:
        """Share of blocks that are referenced by requests, 0-1."""
        return 1.0 - self.pool.num_free / self.pool.num_usable

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold."""
        return self.pool.num_usable

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_referenced(self) -> int:
        return self.pool.num_usable - self.pool.num_free

    @property
    def num_shared(self) -> int:
        """Blocks with more than one reference."""
        return self.pool.num_shared

    def reset_cache(self) -> None:
        """Drop all cached content. Requests keep their blocks."""
        self.pool.reset_cache()

    def check_invariants(self, others: Iterable[Block] = ()) -> None:
        """Check that block tables, reference counts, free list and cache are consistent. others: blocks
        that transfers hold."""
        references = count_references(
            self.tables, self._most_held, self.pool.null_block, self.enable_prefix_caching
        )
        for block in others:
            references[block.block_id] += 1
        self.pool.check_invariants(references)


def _can_be_copied(block: Block, step_id: int) -> bool:
    """Copies are made before a step's forward pass, so a block that the step computes cannot be copied."""
    return block.content is None or block.step_id < step_id


_NO_GROWTH = Growth((), [])

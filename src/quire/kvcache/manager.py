"""Block tables of requests over a `BlockPool`: prefix matches, growth, registration, release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.kvcache.block import ROOT_SERIAL, Block, CacheKey, hash_block
from quire.kvcache.block_pool import BlockPool

LEAST_COPIED = 4
"""Tokens in a tail that make its copy worthwhile; fewer are computed in less time."""


@dataclass(slots=True)
class PrefixMatch:
    """KV that exists already for the first `num_tokens` tokens of a request.

    `blocks` are full and will be shared by reference. `tail`, if any, holds the KV of `tail_tokens` more
    tokens; it belongs to others, so it is copied (copy-on-write) before this request appends to it.
    """

    num_tokens: int = 0
    blocks: list[Block] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)
    tail: Block | None = None

    def drop_tail(self, block_size: int) -> None:
        """Do without the copied part: its tokens are computed again."""
        self.tail = None
        self.num_tokens = len(self.blocks) * block_size


@dataclass(slots=True)
class _Table:
    """One request's blocks. The first `len(serials)` are full, and their content is known."""

    key: CacheKey
    blocks: list[Block]
    serials: list[int]


@dataclass(frozen=True, slots=True)
class Growth:
    """Blocks newly in a request's table, and the copy that must precede their use."""

    block_ids: list[int]
    copies: list[tuple[int, int]]
    """(source, destination) block ids."""


class KVCacheManager:
    """Turns "this request will have KV for its first n tokens" into blocks.

    A block table is append-only. Full blocks are registered with the pool when their tokens are
    *scheduled*, not when computed: a request planned later in the same step may already share them,
    because every layer writes all of the step's KV before any of its attention reads.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.tables: dict[int, _Table] = {}
        self._hashes: dict[int, list[bytes]] = {}

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_blocks_of(self, request_id: int) -> int:
        return len(self.tables[request_id].blocks)

    def num_missing(self, request_id: int, num_tokens: int) -> int:
        """Blocks that its table lacks to hold so many tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(self.tables[request_id].blocks))

    def num_shareable_tokens(self, request_id: int) -> int:
        """How many of its first tokens others find, those scheduled in this step included."""
        return len(self.tables[request_id].serials) * self.block_size

    def block_ids(self, request_id: int) -> list[int]:
        return [block.block_id for block in self.tables[request_id].blocks]

    # --- before admission -------------------------------------------------------------------------

    def match_prefix(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey, step_id: int
    ) -> PrefixMatch:
        """The longest cached prefix, at most all tokens but the last: that one must be computed, to
        have something to sample from. Takes no references."""
        match = PrefixMatch()
        if not self.enable_prefix_caching:
            return match
        size = self.block_size
        serial = ROOT_SERIAL
        hashes = self._hashes_of(request_id, token_ids, key)
        for index in range(len(token_ids) // size):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            block = self.pool.lookup(hashes[index], parent_serial=serial, tokens=tokens, key=key)
            if block is None or block.content is None:
                break
            serial = block.content.serial
            match.blocks.append(block)
            match.serials.append(serial)
        match.num_tokens = len(match.blocks) * size
        if match.num_tokens == len(token_ids) and match.blocks:
            self._leave_last_token(match, step_id)
        else:
            rest = token_ids[match.num_tokens : min(match.num_tokens + size, len(token_ids) - 1)]
            tail, count = self.pool.lookup_tail(serial, rest, key)
            if tail is not None and count >= LEAST_COPIED and _can_be_copied(tail, step_id):
                match.tail = tail
                match.num_tokens += count
        return match

    def _leave_last_token(self, match: PrefixMatch, step_id: int) -> None:
        """Everything is cached: keep all but the last slot of the last block, by copying it, or
        recompute that block."""
        last = match.blocks.pop()
        match.serials.pop()
        match.num_tokens -= self.block_size
        if _can_be_copied(last, step_id):
            match.tail = last
            match.num_tokens += self.block_size - 1

    def match_fork(self, leader_id: int, num_tokens: int, step_id: int) -> PrefixMatch:
        """Share the first `num_tokens` tokens of a running request, all of which it counts as
        computed. Finer than `match_prefix`: the partial last block is taken over by copy."""
        leader = self.tables[leader_id]
        full, rest = divmod(num_tokens, self.block_size)
        assert len(leader.blocks) * self.block_size >= num_tokens
        match = PrefixMatch(
            num_tokens=num_tokens,
            blocks=leader.blocks[:full],
            serials=leader.serials[:full],
            tail=leader.blocks[full] if rest else None,
        )
        # A leader admitted in this step may itself have matched a block that the step computes.
        if match.tail is not None and not _can_be_copied(match.tail, step_id):
            match.drop_tail(self.block_size)
        return match

    def blocks_needed(self, match: PrefixMatch, num_tokens: int) -> int:
        """Free blocks that it takes to admit a request with this match and `num_tokens` tokens."""
        revived = sum(1 for block in match.blocks if block.ref_count == 0)
        new = self.blocks_for(num_tokens) - len(match.blocks)
        if match.tail is not None and match.tail.ref_count == 0:
            new += 1  # held for a moment while it is copied
        return new + revived

    # --- while running ----------------------------------------------------------------------------

    def admit(self, request_id: int, match: PrefixMatch, key: CacheKey, num_tokens: int) -> Growth:
        """Open a block table that starts with `match` and reaches to `num_tokens` tokens."""
        assert request_id not in self.tables
        self.pool.acquire(match.blocks)
        self.tables[request_id] = _Table(key, list(match.blocks), list(match.serials))
        if match.tail is None:
            growth = self.grow(request_id, num_tokens)
            assert growth is not None, "blocks_needed was not asked"
            return Growth(self.block_ids(request_id), [])
        # The tail must not be handed out as its own copy's destination.
        self.pool.acquire([match.tail])
        growth = self.grow(request_id, max(num_tokens, match.num_tokens))
        assert growth is not None, "blocks_needed was not asked"
        copy = (match.tail.block_id, growth.block_ids[0])
        self.pool.release([match.tail])
        return Growth(self.block_ids(request_id), [copy])

    def grow(self, request_id: int, num_tokens: int) -> Growth | None:
        """Extend the table to hold `num_tokens` tokens; None, and no change, if blocks are lacking."""
        table = self.tables[request_id]
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing <= 0:
            return _NO_GROWTH
        if missing > self.pool.num_free:
            return None
        new = self.pool.allocate(missing)
        table.blocks.extend(new)
        return Growth([block.block_id for block in new], [])

    def register(
        self, request_id: int, token_ids: Sequence[int], num_tokens: int, step_id: int
    ) -> None:
        """Blocks filled by the first `num_tokens` tokens (computed or in this step) can be shared."""
        if not self.enable_prefix_caching:
            return
        table = self.tables[request_id]
        size = self.block_size
        full = num_tokens // size
        if full <= len(table.serials):
            return
        hashes = self._hashes_of(request_id, token_ids, table.key)
        for index in range(len(table.serials), full):
            serial = self.pool.register(
                table.blocks[index],
                hashes[index],
                parent_serial=table.serials[-1] if table.serials else ROOT_SERIAL,
                tokens=tuple(token_ids[index * size : (index + 1) * size]),
                key=table.key,
                step_id=step_id,
            )
            table.serials.append(serial)

    def release(self, request_id: int, token_ids: Sequence[int] = (), *, step_id: int = 0) -> None:
        """Drop the request's references, tail first, so that its head is evicted last.

        token_ids: those whose KV is there, if it is good: the last, partial block is then kept as a tail.
        """
        table = self.tables.pop(request_id)
        start = len(table.serials) * self.block_size
        tokens = tuple(token_ids[start : start + self.block_size])
        if self.enable_prefix_caching and LEAST_COPIED <= len(tokens) < self.block_size:
            hashes = self._hashes_of(request_id, token_ids, table.key)
            parent = hashes[len(table.serials) - 1] if start else table.key.root_hash
            self.pool.register_tail(
                table.blocks[len(table.serials)],
                hash_block(parent, tokens),
                parent_serial=table.serials[-1] if start else ROOT_SERIAL,
                tokens=tokens,
                key=table.key,
                step_id=step_id,
            )
        self.pool.release(reversed(table.blocks))

    def forget(self, request_id: int) -> None:
        """The request is over for good: drop its hashes too."""
        self._hashes.pop(request_id, None)

    def _hashes_of(self, request_id: int, token_ids: Sequence[int], key: CacheKey) -> list[bytes]:
        hashes = self._hashes.setdefault(request_id, [])
        size = self.block_size
        for index in range(len(hashes), len(token_ids) // size):
            parent = hashes[-1] if hashes else key.root_hash
            hashes.append(hash_block(parent, token_ids[index * size : (index + 1) * size]))
        return hashes

    # --- accounting -------------------------------------------------------------------------------

    @property
    def usage(self) -> float:
        """Share of blocks that requests hold, 0-1."""
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
        """Blocks that more than one request holds."""
        return self.pool.num_shared

    def reset_cache(self) -> None:
        """Forget all cached content. Requests keep their blocks."""
        self.pool.reset_cache()

    def check_invariants(self) -> None:
        """Prove block tables, reference counts, free list and cache consistent."""
        references: dict[int, int] = {}
        for request_id, table in self.tables.items():
            ids = [block.block_id for block in table.blocks]
            assert len(ids) == len(set(ids)), f"request {request_id} holds a block twice"
            for block_id in ids:
                references[block_id] = references.get(block_id, 0) + 1
            for block in table.blocks[len(table.serials) :]:
                assert block.ref_count == 1 or not self.enable_prefix_caching, (
                    f"request {request_id} may write shared {block}"
                )
        self.pool.check_invariants(references)


def _can_be_copied(block: Block, step_id: int) -> bool:
    """Copies are made before a step's forward pass, so what that step computes is not there yet."""
    return block.content is None or block.content.step_id < step_id


_NO_GROWTH = Growth([], [])

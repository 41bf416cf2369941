"""Which blocks are free, referenced, cached. Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, CacheKey, FreeList

MOST_TAILS = 16
"""Tails kept of one full block's continuations, the latest ones: looking for one compares them all."""


class BlockPool:
    """Reference-counted blocks that double as the prefix cache.

    A block whose last reference is dropped goes to the free list with its content and hash intact, and
    stays a possible prefix hit until it is handed out again. So the cache costs no memory that requests
    could have used, and nothing decides how large it is. Requests release their blocks tail first,
    so of one request's blocks the head, which most others can share, is evicted last.

    num_blocks: blocks in the KV cache, including the null block (id 0).
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "one null block and at least one real one"
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeList()
        self._cached: dict[bytes, Block] = {}
        self._tails: dict[int, list[Block]] = {}
        """By the serial of the full block before them."""
        self._next_serial = 1
        self.num_shared = 0
        for block in self.blocks[NULL_BLOCK_ID + 1 :]:
            self._free.append(block)

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[Block]:
        """`count` blocks with one reference each; their old content is forgotten. The caller has
        checked `num_free`."""
        taken = []
        for _ in range(count):
            block = self._free.popleft()
            self._forget(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def acquire(self, blocks: Iterable[Block]) -> None:
        """Add a reference to each block, taking it off the free list if it was there."""
        for block in blocks:
            if block.ref_count == 0:
                self._free.remove(block)
            elif block.ref_count == 1:
                self.num_shared += 1
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Drop a reference from each block. Those without cached content are reused first."""
        for block in blocks:
            assert block.ref_count > 0, f"double free of {block}"
            block.ref_count -= 1
            if block.ref_count == 1:
                self.num_shared -= 1
            elif block.ref_count == 0:
                if block.content is None:
                    self._free.prepend(block)
                else:
                    self._free.append(block)

    def register(
        self,
        block: Block,
        block_hash: bytes,
        *,
        parent_serial: int,
        tokens: tuple[int, ...],
        key: CacheKey,
        step_id: int,
    ) -> int:
        """Make a full block findable; returns the serial of its content.

        If the same content is cached in another block already, that one stays the cached one and its
        serial is returned. If the hash is taken by other content (an orphan whose parent was evicted,
        or a collision), this block takes the hash over.
        """
        assert block.ref_count > 0 and block.content is None
        existing = self._cached.get(block_hash)
        if existing is not None:
            found = self._verify(existing, parent_serial, tokens, key)
            if found is not None:
                return found.serial
            self._forget(existing)
        serial = self._next_serial
        self._next_serial += 1
        block.content = BlockContent(block_hash, parent_serial, tokens, key, serial, step_id)
        self._cached[block_hash] = block
        return serial

    def register_tail(
        self,
        block: Block,
        block_hash: bytes,
        *,
        parent_serial: int,
        tokens: tuple[int, ...],
        key: CacheKey,
        step_id: int,
    ) -> None:
        """Make a partial block findable, which its only owner is about to release."""
        assert block.ref_count == 1 and block.content is None
        if block_hash in self._cached:
            return
        tails = self._tails.setdefault(parent_serial, [])
        if len(tails) == MOST_TAILS:
            self._forget(tails[0])
        serial = self._next_serial
        self._next_serial += 1
        block.content = BlockContent(block_hash, parent_serial, tokens, key, serial, step_id)
        self._cached[block_hash] = block
        self._tails.setdefault(parent_serial, []).append(block)

    def lookup_tail(
        self, parent_serial: int, tokens: Sequence[int], key: CacheKey
    ) -> tuple[Block | None, int]:
        """The tail after that content which begins with the most of `tokens`, and how many that is."""
        best, most = None, 0
        for block in self._tails.get(parent_serial, ()):
            assert block.content is not None
            if block.content.key != key:
                continue
            count = 0
            for ours, theirs in zip(tokens, block.content.tokens, strict=False):
                if ours != theirs:
                    break
                count += 1
            if count > most:
                best, most = block, count
        return best, most

    def lookup(
        self,
        block_hash: bytes,
        *,
        parent_serial: int,
        tokens: Sequence[int],
        key: CacheKey,
    ) -> Block | None:
        """The block that provably holds this content, or None."""
        block = self._cached.get(block_hash)
        if block is None:
            return None
        if self._verify(block, parent_serial, tuple(tokens), key) is None:
            return None
        return block

    def reset_cache(self) -> None:
        """Forget all cached content. Blocks in use stay with their requests."""
        for block in self._cached.values():
            block.content = None
        self._cached.clear()
        self._tails.clear()

    @staticmethod
    def _verify(
        block: Block, parent_serial: int, tokens: tuple[int, ...], key: CacheKey
    ) -> BlockContent | None:
        content = block.content
        assert content is not None
        same = (
            content.parent_serial == parent_serial
            and content.tokens == tokens
            and content.key == key
        )
        return content if same else None

    def _forget(self, block: Block) -> None:
        """Its content cannot be found any more."""
        content = block.content
        if content is None:
            return
        del self._cached[content.block_hash]
        block.content = None
        tails = self._tails.get(content.parent_serial, [])
        if block in tails:
            tails.remove(block)
            if not tails:
                del self._tails[content.parent_serial]

    def check_invariants(self, references: dict[int, int]) -> None:
        """Prove counts, free list and cache consistent with `references` (block id -> how many block
        tables hold it). Raises AssertionError."""
        free_ids = [block.block_id for block in self._free]
        assert len(free_ids) == len(set(free_ids)) == len(self._free), "free list has duplicates"
        free = set(free_ids)
        assert NULL_BLOCK_ID not in free and self.blocks[NULL_BLOCK_ID].ref_count == 0
        for block in self.blocks[NULL_BLOCK_ID + 1 :]:
            expected = references.get(block.block_id, 0)
            assert block.ref_count == expected, f"{block}: {expected} tables hold it"
            assert (block.block_id in free) == (expected == 0), f"{block} is lost or doubly owned"
            if block.content is not None:
                assert self._cached.get(block.content.block_hash) is block, f"{block} unfindable"
        assert sum(1 for b in self.blocks if b.content is not None) == len(self._cached)
        for serial, tails in self._tails.items():
            assert tails and len({block.block_id for block in tails}) == len(tails) <= MOST_TAILS
            for block in tails:
                assert block.content is not None and block.content.parent_serial == serial
        assert self.num_shared == sum(1 for count in references.values() if count > 1)

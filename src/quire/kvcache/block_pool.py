"""The state of all blocks: free, referenced, cached. Does not know requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, CacheKey, FreeList
from quire.kvcache.observer import CacheObserver
from quire.kvcache.retention import Retention
from quire.placement import Placement

MOST_TAILS = 16
"""Most tails that are kept after one full block, the latest ones: a lookup compares all of them."""


class CachedTails(Protocol):
    """Knows what depends on the tokens of partial blocks. The record keeps that; a replay, which has no
    tokens, returns what was recorded."""

    def named(self, tail_hash: bytes) -> bytes:
        """The hash under which a tail is cached."""

    def shared(
        self, tails: Sequence[BlockContent], best: BlockContent | None, count: int
    ) -> tuple[BlockContent | None, int]:
        """Of these tails the one that shares most tokens with a prompt, and how many."""


class BlockPool:
    """Reference-counted blocks that double as the prefix cache.

    A block whose last reference is dropped goes to the free list with its content and hash intact, and
    stays a possible prefix hit until it is handed out again. So the cache takes no memory that requests
    could have used, and has no size of its own. Requests release their blocks tail first,
    so of one request's blocks the head, which most others can share, is evicted last.

    Layers are in groups (`quire.kv_layout`). A block holds some tokens' KV in the layers of one group. Any
    group may take it: pages of all groups are equally large.

    num_blocks: blocks in the KV cache, including the null block (id 0).
    retention: of content that is evicted last. A free block is in the free list's kept part exactly while its
    content is retained.
    """

    def __init__(
        self, num_blocks: int, *, num_groups: int = 1, retention: Retention | None = None
    ) -> None:
        assert num_blocks >= 2, "one null block and at least one real one"
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.num_groups = num_groups
        self.retention = Retention(0) if retention is None else retention
        self._free = FreeList()
        self._cached: dict[bytes, BlockContent] = {}
        """Hash -> content that at least one block has."""
        self._tails: dict[BlockContent | CacheKey, list[BlockContent]] = {}
        """Tails by the content before them."""
        self.num_shared = 0
        self.observers: tuple[CacheObserver, ...] = ()
        self.tails: CachedTails | None = None
        for block in self.blocks[NULL_BLOCK_ID + 1 :]:
            self._free.append(block)

    @property
    def null_block(self) -> Block:
        return self.blocks[NULL_BLOCK_ID]

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all except the null block."""
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[Block]:
        """`count` blocks with one reference each; their old content is dropped. The caller has
        checked `num_free`."""
        if len(self.retention):
            for content in self.retention.expired():
                self._move(content)
        taken = []
        for _ in range(count):
            block = self._free.popleft()
            if block.content is not None:
                for observer in self.observers:
                    observer.evicts(block)
            self._forget(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def acquire(self, blocks: Iterable[Block]) -> None:
        """Add a reference to each block, and remove it from the free list if it was there."""
        for block in blocks:
            if block.ref_count == 0:
                self._free.remove(block)
            elif block.ref_count == 1:
                self.num_shared += 1
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Drop a reference from each block. Blocks without cached content are reused first."""
        for block in blocks:
            assert block.ref_count > 0, f"double free of {block}"
            block.ref_count -= 1
            if block.ref_count == 1:
                self.num_shared -= 1
            elif block.ref_count == 0:
                if block.content is None:
                    self._free.prepend(block)
                elif block.content.hold is None:
                    self._free.append(block)
                else:
                    self.retention.touch(block.content)
                    self._free.keep(block)

    def retain(self, contents: Sequence[BlockContent], placement: Placement) -> None:
        """Evict content after others, as a request asks that begins with it and is about to release it."""
        end = sum(len(content.tokens) for content in contents)
        for content in reversed(contents):
            wishes = [
                wish.seconds
                for wish in placement.retain
                if wish.num_tokens is None or wish.num_tokens >= end
            ]
            end -= len(content.tokens)
            if wishes and self.retention.most and any(content.blocks):
                for lost in self.retention.keep(content, placement.tenant, max(wishes)):
                    self._move(lost)
                self._move(content)

    def _move(self, content: BlockContent) -> None:
        """Put its free blocks where they belong after it was kept, or is no longer."""
        for block in content.blocks:
            if block is not None and block.ref_count == 0:
                self._free.remove(block)
                (self._free.append if content.hold is None else self._free.keep)(block)

    def register(
        self,
        blocks: Sequence[Block],
        block_hash: bytes,
        parent: BlockContent | CacheKey,
        tokens: tuple[int, ...],
        step_id: int,
    ) -> BlockContent:
        """Make full blocks findable, one of each group (the null block for a group that holds none); returns
        their content.

        A group that has cached the same content in another block keeps that one. If the hash is taken by
        other content (one whose parent was evicted and computed again, or a collision), that is forgotten.
        """
        content = self._cached.get(block_hash)
        if content is not None and not content.follows(parent, tokens):
            self._forget_content(content)
            content = None
        if content is None:
            content = BlockContent(block_hash, parent, tokens, [None] * self.num_groups)
        self._fill(content, blocks, step_id)
        return content

    def register_tail(
        self,
        blocks: Sequence[Block],
        block_hash: bytes,
        parent: BlockContent | CacheKey,
        tokens: tuple[int, ...],
        step_id: int,
    ) -> None:
        """Make partial blocks findable, which their only owner is about to release: one of each group."""
        assert all(block.ref_count == 1 for block in blocks)
        if self.tails is not None:
            block_hash = self.tails.named(block_hash)
        if block_hash in self._cached:
            return
        tails = self._tails.get(parent, [])
        if len(tails) == MOST_TAILS:
            self._forget_content(tails[0])
        content = BlockContent(block_hash, parent, tokens, [None] * self.num_groups)
        self._fill(content, blocks, step_id)
        self._tails.setdefault(parent, []).append(content)

    def _fill(self, content: BlockContent, blocks: Sequence[Block], step_id: int) -> None:
        """Assign the content to blocks, for the groups in which no block has it."""
        for group, block in enumerate(blocks):
            if content.blocks[group] is None and block.block_id != NULL_BLOCK_ID:
                assert block.ref_count > 0 and block.content is None
                block.content, block.group, block.step_id = content, group, step_id
                content.blocks[group] = block
                self._cached[content.block_hash] = content
                for observer in self.observers:
                    observer.stored(content, group)

    def lookup_tail(
        self, parent: BlockContent | CacheKey, tokens: Sequence[int]
    ) -> tuple[BlockContent | None, int]:
        """The tail after that content that shares the longest beginning with `tokens`, and its length."""
        best, most = None, 0
        tails = self._tails.get(parent, ())
        for content in tails:
            count = 0
            for ours, theirs in zip(tokens, content.tokens, strict=False):
                if ours != theirs:
                    break
                count += 1
            if count > most:
                best, most = content, count
        return (best, most) if self.tails is None else self.tails.shared(tails, best, most)

    def lookup(
        self, block_hash: bytes, parent: BlockContent | CacheKey, tokens: tuple[int, ...]
    ) -> BlockContent | None:
        """This content, verified, if a block of any group has it."""
        content = self._cached.get(block_hash)
        return content if content is not None and content.follows(parent, tokens) else None

    def get(self, block_hash: bytes) -> BlockContent | None:
        """The content cached under this hash, not verified."""
        return self._cached.get(block_hash)

    def reset_cache(self) -> None:
        """Drop all cached content. Blocks in use stay with their requests."""
        dropped = list(self._cached.values())
        observers, self.observers = self.observers, ()
        for content in dropped:
            self._forget_content(content)
        self.observers = observers
        for observer in observers:
            observer.cleared(dropped)

    def cached(self) -> Iterator[tuple[BlockContent, int]]:
        """All that is cached: content, and a group in which a block has it."""
        for content in self._cached.values():
            for group, block in enumerate(content.blocks):
                if block is not None:
                    yield content, group

    def _forget(self, block: Block) -> None:
        """Drop the block's content from the cache."""
        content = block.content
        if content is None:
            return
        block.content = None
        content.blocks[block.group] = None
        for observer in self.observers:
            observer.removed(content, block.group)
        if content in self._tails.get(content.parent, ()):
            self._forget_content(content)  # a tail is copied whole
        elif not any(content.blocks):
            self._drop(content)

    def _forget_content(self, content: BlockContent) -> None:
        """Drop content that no block has any more."""
        for group, block in enumerate(content.blocks):
            if block is not None:
                block.content = content.blocks[group] = None
                if content.hold is not None and block.ref_count == 0:
                    self._free.remove(block)
                    self._free.prepend(block)
                for observer in self.observers:
                    observer.removed(content, group)
        self._drop(content)
        tails = self._tails.get(content.parent, [])
        if content in tails:
            tails.remove(content)
            if not tails:
                del self._tails[content.parent]

    def _drop(self, content: BlockContent) -> None:
        del self._cached[content.block_hash]
        if content.hold is not None:
            self.retention.drop(content)

    def check_invariants(self, references: dict[int, int]) -> None:
        """Check that counts, free list and cache are consistent with `references` (block id -> how many block
        tables hold it). Raises AssertionError."""
        free_ids = [block.block_id for block in self._free]
        assert len(free_ids) == len(set(free_ids)) == len(self._free), "free list has duplicates"
        free = set(free_ids)
        assert NULL_BLOCK_ID not in free and self.blocks[NULL_BLOCK_ID].ref_count == 0
        for block in self.blocks[NULL_BLOCK_ID + 1 :]:
            expected = references.get(block.block_id, 0)
            assert block.ref_count == expected, f"{block}: {expected} tables hold it"
            assert (block.block_id in free) == (expected == 0), f"{block} is lost or doubly owned"
            if (content := block.content) is not None:
                assert content.blocks[block.group] is block, f"{block} is not its content's"
                assert self._cached.get(content.block_hash) is content, f"{block} unfindable"
        kept = {block.block_id for block in self._free.kept()}
        for block in self._free:
            is_kept = block.content is not None and block.content.hold is not None
            assert (block.block_id in kept) == is_kept, f"{block} is in the wrong part"
        self.retention.check_invariants()
        for content in self._cached.values():
            held = [block for block in content.blocks if block is not None]
            assert held and all(block.content is content for block in held)
        for parent, tails in self._tails.items():
            assert tails and len(set(tails)) == len(tails) <= MOST_TAILS
            for content in tails:
                assert content.parent == parent and None not in content.blocks
        assert self.num_shared == sum(1 for count in references.values() if count > 1)

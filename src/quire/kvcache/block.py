"""A block, the identity of its content, and the free list."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NULL_BLOCK_ID = 0
"""Never handed out: padding rows, and block-table entries that are not read, point at it."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Namespace of a chain of blocks. Requests with different keys share no cached KV."""

    salt: str | None = None
    """Chosen by the client or tenant, so that cached KV is not shared with others."""
    adapter: str | None = None
    """The LoRA adapter whose weights computed the KV."""

    @property
    def root_hash(self) -> bytes:
        """Parent hash of a first block."""
        parts = (self.salt, self.adapter)
        encoded = [b"" if part is None else part.encode("utf-8", "surrogatepass") for part in parts]
        lengths = array("q", (-1 if part is None else len(part) for part in parts))
        return hashlib.sha256(b"quire" + lengths.tobytes() + b"".join(encoded)).digest()


@dataclass(eq=False, slots=True)
class Hold:
    """A client's wish to keep content, see `quire.kvcache.retention`."""

    tenant: str
    seconds: float
    """How long after its last use."""
    until: float


@dataclass(eq=False, repr=False, slots=True)
class BlockContent:
    """Identity of a block's KV: its tokens and everything before them. A full block is shared by reference,
    the partial one that a request left behind (its tail) by copy.

    `block_hash` finds a candidate; `parent` and `tokens` verify it. The parent was verified earlier in
    the chain, so by induction a hit has exactly the wanted prefix, even if the hash were weak. A parent
    stays known as long as content after it is cached, even if no block holds it any more, as is usual
    behind a sliding window.
    """

    block_hash: bytes
    parent: BlockContent | CacheKey
    tokens: tuple[int, ...]
    blocks: list[Block | None]
    """By group of layers: the block with its KV, if there is one."""
    hold: Hold | None = None
    num_hits: int = 0
    """Requests that found it in the cache. Counted only if there is a connector."""
    key: CacheKey = field(init=False)
    """The namespace of the chain."""

    def __post_init__(self) -> None:
        self.key = self.parent if isinstance(self.parent, CacheKey) else self.parent.key

    def follows(self, parent: BlockContent | CacheKey, tokens: tuple[int, ...]) -> bool:
        same = self.parent is parent or self.parent == parent  # keys are equal, contents identical
        return same and self.tokens == tokens

    def __repr__(self) -> str:
        return f"BlockContent({self.block_hash.hex()[:8]}, {len(self.tokens)} tokens)"

    def chain(self) -> list[BlockContent]:
        """From the first block's content to this one."""
        found = [self]
        while isinstance(found[-1].parent, BlockContent):
            found.append(found[-1].parent)
        found.reverse()
        return found


class Block:
    """A fixed number of token slots in every layer of a group. The links belong to the free list."""

    __slots__ = ("block_id", "content", "group", "next_free", "prev_free", "ref_count", "step_id")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.content: BlockContent | None = None
        self.group = 0
        """The group of its content."""
        self.step_id = 0
        """The step that computes its content. Its KV may be read in that step, but copied only in later
        ones."""
        self.prev_free: Block | None = None
        self.next_free: Block | None = None

    def __repr__(self) -> str:
        return f"Block({self.block_id}, refs={self.ref_count}, cached={self.content is not None})"


class FreeList:
    """Free blocks in eviction order, the next to be handed out first: ordinary ones, then kept ones.

    Doubly linked through the blocks themselves, not a deque, because a prefix hit takes a block out of
    the middle in constant time.
    """

    def __init__(self) -> None:
        self._head = Block(-1)
        self._kept = Block(-3)
        """Separates the two kinds."""
        self._tail = Block(-2)
        self._head.next_free, self._tail.prev_free = self._kept, self._kept
        self._kept.prev_free, self._kept.next_free = self._head, self._tail
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            if block is not self._kept:
                yield block
            block = block.next_free

    def append(self, block: Block) -> None:
        """Add at the end of the ordinary ones."""
        assert self._kept.prev_free is not None
        self._insert_after(self._kept.prev_free, block)

    def keep(self, block: Block) -> None:
        """Add at the end of all: handed out last."""
        assert self._tail.prev_free is not None
        self._insert_after(self._tail.prev_free, block)

    def kept(self) -> Iterator[Block]:
        block = self._kept.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def prepend(self, block: Block) -> None:
        """Add at the beginning: handed out first, because its content is of no use."""
        self._insert_after(self._head, block)

    def popleft(self) -> Block:
        block = self._head.next_free
        if block is self._kept:
            block = self._kept.next_free
        assert block is not None and block is not self._tail, "the free list is empty"
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        before, after = block.prev_free, block.next_free
        assert before is not None and after is not None, f"{block} is not in the free list"
        before.next_free, after.prev_free = after, before
        block.prev_free = block.next_free = None
        self._size -= 1

    def _insert_after(self, before: Block, block: Block) -> None:
        assert block.prev_free is None, f"{block} is already in the free list"
        after = before.next_free
        assert after is not None
        before.next_free, block.prev_free = block, before
        block.next_free, after.prev_free = after, block
        self._size += 1


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """SHA-256 over the parent's hash and the tokens as int32: about 1 us for 16 tokens."""
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()

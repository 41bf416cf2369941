"""A block, what it holds, and the free list."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NULL_BLOCK_ID = 0
"""Never handed out: padding rows and unused block-table entries point at it."""

ROOT_SERIAL = 0
"""Parent of a first block."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Namespace of a chain of blocks. Requests with different keys share no cached KV."""

    salt: str | None = None
    """Chosen by the client or tenant, to share with nobody else."""
    adapter: str | None = None
    """The LoRA adapter whose weights computed the KV."""

    @property
    def root_hash(self) -> bytes:
        """Parent hash of a first block."""
        parts = (self.salt, self.adapter)
        encoded = [b"" if part is None else part.encode("utf-8", "surrogatepass") for part in parts]
        lengths = array("q", (-1 if part is None else len(part) for part in parts))
        return hashlib.sha256(b"quire" + lengths.tobytes() + b"".join(encoded)).digest()


@dataclass(frozen=True, slots=True)
class BlockContent:
    """Identity of a block's KV: its tokens and everything before them. A full block is shared by reference,
    the partial one that a request left behind (its tail) by copy.

    `block_hash` finds a candidate; `parent_serial`, `tokens` and `key` prove it. The serial of the
    parent's content was itself proved on the way down the chain, so by induction a hit holds exactly
    the wanted prefix, even if the hash were weak.
    """

    block_hash: bytes
    parent_serial: int
    tokens: tuple[int, ...]
    key: CacheKey
    serial: int
    """Unique to this content for the life of the pool."""
    step_id: int
    """The step that computes it. Its KV may be read in that step, but copied only in later ones."""


class Block:
    """A fixed number of token slots in every layer. Links are for the free list alone."""

    __slots__ = ("block_id", "content", "next_free", "prev_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.content: BlockContent | None = None
        self.prev_free: Block | None = None
        self.next_free: Block | None = None

    def __repr__(self) -> str:
        return f"Block({self.block_id}, refs={self.ref_count}, cached={self.content is not None})"


class FreeList:
    """Free blocks in eviction order, the next to be handed out first.

    Doubly linked through the blocks themselves, not a deque, because a prefix hit takes a block out of
    the middle in constant time.
    """

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-2)
        self._head.next_free, self._tail.prev_free = self._tail, self._head
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def append(self, block: Block) -> None:
        """Last to be handed out."""
        assert self._tail.prev_free is not None
        self._insert_after(self._tail.prev_free, block)

    def prepend(self, block: Block) -> None:
        """First to be handed out: its content is worth nothing."""
        self._insert_after(self._head, block)

    def popleft(self) -> Block:
        block = self._head.next_free
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

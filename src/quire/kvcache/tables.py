"""A request's block tables, and what changes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, CacheKey
from quire.messages import BlockIds


@dataclass(slots=True)
class PrefixMatch:
    """Existing KV for the first `num_tokens` tokens of a request, as far as the next token reads it.

    `blocks` are full and will be shared by reference. `tails`, if any, hold the KV of some more tokens; they
    belong to others, so they are copied (copy-on-write) before this request appends to them.
    """

    num_tokens: int
    blocks: list[list[Block]]
    """By group. The null block stands for blocks behind the window."""
    contents: list[BlockContent] = field(default_factory=list)
    """The contents of the full blocks, as far as they are known."""
    tails: list[Block] = field(default_factory=list)
    """One block of each group, or none."""


@dataclass(slots=True)
class Table:
    """One request's blocks, of each group as many. The first `len(contents)` are full, and their content is
    known."""

    key: CacheKey
    blocks: list[list[Block]]
    contents: list[BlockContent]
    first: list[int]
    """By group: index of the first block that is not behind the window. Entries before it are the null
    block."""
    slides_at: int
    """See `KVCacheManager.slide`."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Blocks added to a request's tables, and the copies that must precede their use."""

    block_ids: BlockIds
    """Empty if no block was added."""
    copies: list[tuple[int, int]]
    """(source, destination) block ids."""


def tail_first(table: Table) -> Iterator[Block]:
    if len(table.blocks) == 1:
        yield from reversed(table.blocks[0][table.first[0] :])
        return
    for index in range(len(table.blocks[0]) - 1, -1, -1):
        for first, blocks in zip(table.first, table.blocks, strict=True):
            if index >= first:
                yield blocks[index]


def count_references(
    tables: Mapping[int, Table], most_held: Sequence[int | None], null_block: Block, may_share: bool
) -> Counter[int]:
    """The references of all tables by block id. Checks each table on the way. most_held: blocks of a request
    in each group."""
    references: Counter[int] = Counter()
    for request_id, table in tables.items():
        ids = [block.block_id for block in tail_first(table)]
        assert len(ids) == len(set(ids)), f"request {request_id} holds a block twice"
        assert NULL_BLOCK_ID not in ids
        references.update(ids)
        full = len(table.contents)
        for first, most, blocks in zip(table.first, most_held, table.blocks, strict=True):
            assert len(blocks) == len(table.blocks[0])
            assert set(blocks[:first]) <= {null_block}
            assert most is None or len(blocks) - first <= most
            for block in blocks[max(first, full) :]:
                assert block.ref_count == 1 or not may_share, (
                    f"request {request_id} may write shared {block}"
                )
    return references

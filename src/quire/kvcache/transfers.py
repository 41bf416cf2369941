"""Blocks that are being loaded or saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from quire.kvcache.block import Block, BlockContent, CacheKey
from quire.kvcache.connector import KVConnector
from quire.kvcache.manager import KVCacheManager
from quire.messages import BlockName, Transfer

MOST_LOOKED_AT = 8
"""In every step, the connector is asked whether to save the blocks that are reused next, up to this
number."""


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """A full block of a request's prefix to load."""

    index: int
    group: int


@dataclass(slots=True)
class Load:
    """Full blocks of a request's prefix, from index `start` on, and those of them to load."""

    parent: BlockContent | CacheKey
    """The content before them."""
    start: int
    hashes: list[bytes]
    tokens: list[tuple[int, ...]]
    wanted: list[WantedBlock]
    """In ascending order of index."""

    def name(self, wanted: WantedBlock) -> BlockName:
        return (self.hashes[wanted.index - self.start], wanted.group)


@dataclass(slots=True)
class _UnderWay:
    blocks: list[Block]
    """The blocks to move."""
    held: list[Block] = field(default_factory=list)
    """Blocks found in the cache before the loaded ones, kept there until the load is done."""
    load: Load | None = None


class Transfers:
    """Transfers that are planned or under way. Each holds references to its blocks, as a request does,
    until its result arrives. Loaded blocks are then cached content like any other, and a request finds
    them.

    most_held: limit on the blocks that transfers hold, so that enough remain for requests. A transfer
    that would exceed it is not started.
    """

    def __init__(self, kv: KVCacheManager, connector: KVConnector, most_held: int) -> None:
        self._loads: list[Transfer] = []
        self._saves: list[Transfer] = []
        """For the next plan."""
        self._kv, self._pool, self._connector = kv, kv.pool, connector
        self._most_held = most_held
        self._under_way: dict[int, _UnderWay] = {}
        self._next_id = 1

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def blocks(self) -> Iterator[Block]:
        """All blocks that transfers hold."""
        for transfer in self._under_way.values():
            yield from transfer.blocks
            yield from transfer.held

    def may_hold(self, count: int) -> bool:
        return sum(1 for _ in self.blocks()) + count <= self._most_held

    def start_load(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey, free: int
    ) -> int | None:
        """Load the part of a request's prefix that the store has and the cache does not, into at most
        `free` blocks. Returns the transfer's id, or None. After the transfer,
        `KVCacheManager.match_prefix` finds the blocks."""
        load, held = self._plan_load(request_id, token_ids, key)
        names = [load.name(wanted) for wanted in load.wanted]
        in_windows = [name for name in names if self._kv.windows[name[1]] is not None]
        if not names or self._connector.lookup(in_windows) < len(in_windows):
            return None
        revived = sum(1 for block in held if block.ref_count == 0)
        if len(names) + revived > free or not self.may_hold(len(names) + len(held)):
            return None
        self._pool.acquire(held)
        blocks = self._pool.allocate(len(names))
        return self._start(self._loads, names, _UnderWay(blocks, held, load))

    def _plan_load(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey
    ) -> tuple[Load, list[Block]]:
        """The longest prefix that all groups with full attention have, in the cache and after that in the
        store: the blocks of it to load, and the blocks in the cache."""
        kv, size = self._kv, self._kv.block_size
        hashes = kv.hashes_of(request_id, token_ids, key)[: len(token_ids) // size]
        chain = kv.find_chain(request_id, token_ids, key)
        known, full = len(chain), [g for g, window in enumerate(kv.windows) if window is None]
        runs = (
            self._connector.lookup([(name, group) for name in hashes[known:]]) for group in full
        )
        count = min((known + run for run in runs), default=len(hashes))
        wanted: list[WantedBlock] = []
        held: list[Block] = []
        for index in range(count):
            for group in range(len(kv.windows)):
                if index < kv.first_read(group, count * size):
                    continue
                block = chain[index].blocks[group] if index < known else None
                if block is None:
                    wanted.append(WantedBlock(index, group))
                else:
                    held.append(block)
        start = min(wanted[0].index, known) if wanted else count
        tokens = [tuple(token_ids[i * size : (i + 1) * size]) for i in range(start, count)]
        parent = chain[start - 1] if start else key
        return Load(parent, start, hashes[start:count], tokens, wanted), held

    def save_finished(self, request_id: int) -> None:
        """Offer the connector the full blocks of a request that is about to be released."""
        kv, table = self._kv, self._kv.tables[request_id]
        reach = len(table.contents) * kv.block_size
        names, blocks = [], []
        for index, content in enumerate(table.contents):
            for group, first in enumerate(table.first):
                if index < kv.first_read(group, reach):
                    continue
                behind = (
                    index < first
                )  # outside the window of its last token, but not of its last full block
                block = content.blocks[group] if behind else table.blocks[group][index]
                if block is not None:
                    names.append((content.block_hash, group))
                    blocks.append(block)
        if names and self._connector.on_finish(request_id, names):
            self.save(names, blocks)

    def save(self, names: Sequence[BlockName], blocks: list[Block]) -> None:
        if blocks and self.may_hold(len(blocks)):
            self._pool.acquire(blocks)
            self._start(self._saves, names, _UnderWay(blocks))

    def save_evicted(self) -> None:
        """Save those of the next reused blocks that the connector wants."""
        for block in self._pool.next_free(MOST_LOOKED_AT):
            content = block.content
            if content is not None and len(content.tokens) == self._kv.block_size:
                name = (content.block_hash, block.group)
                if self._connector.on_evict(name):
                    self.save([name], [block])

    def take(self) -> tuple[list[Transfer], list[Transfer]]:
        """The loads and saves for the next plan."""
        taken = self._loads, self._saves
        self._loads, self._saves = [], []
        return taken

    def is_under_way(self, transfer_id: int) -> bool:
        return transfer_id in self._under_way

    def finish(self, transfer_id: int, num_good: int, step_id: int) -> None:
        """A transfer is over, and its first `num_good` blocks were moved."""
        transfer = self._under_way.pop(transfer_id)
        if transfer.load is not None:
            self._register(transfer.load, transfer.blocks[:num_good], step_id)
            self._pool.release(reversed(transfer.held + transfer.blocks))
        else:
            self._pool.release(reversed(transfer.blocks), evict_first=True)

    def _start(self, to: list[Transfer], names: Sequence[BlockName], what: _UnderWay) -> int:
        transfer_id, self._next_id = self._next_id, self._next_id + 1
        self._under_way[transfer_id] = what
        block_ids = [block.block_id for block in what.blocks]
        to.append(Transfer(transfer_id=transfer_id, names=list(names), block_ids=block_ids))
        return transfer_id

    def _register(self, load: Load, good: Iterable[Block], step_id: int) -> None:
        groups = self._pool.num_groups
        by_index: dict[int, list[tuple[int, Block]]] = {}
        for wanted, block in zip(load.wanted, good, strict=False):
            by_index.setdefault(wanted.index, []).append((wanted.group, block))
        parent = load.parent
        for offset, (block_hash, tokens) in enumerate(zip(load.hashes, load.tokens, strict=True)):
            there = by_index.get(load.start + offset)
            if there is None:
                found = self._pool.lookup(block_hash, parent, tokens)
                parent = found or BlockContent(block_hash, parent, tokens, [None] * groups)
                continue
            blocks = [self._pool.null_block] * groups
            for group, block in there:
                blocks[group] = block
            parent = self._pool.register(blocks, block_hash, parent, tokens, step_id)

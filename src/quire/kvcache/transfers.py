"""Blocks that are being loaded or saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quire.kvcache.block import Block, BlockContent, CacheKey
from quire.kvcache.connector import KVConnector
from quire.kvcache.manager import KVCacheManager
from quire.kvcache.observer import CacheObserver
from quire.messages import (
    BlockName,
    KVSource,
    Save,
    StepPlan,
    TierChange,
    Transfer,
    TransferResult,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """A full block of a request's prefix to load."""

    index: int
    group: int
    name: BlockName


@dataclass(frozen=True, slots=True)
class Load:
    """Full blocks of a request's prefix, from index `start` on, and those of them to load."""

    parent: BlockContent | CacheKey
    """The content before them."""
    start: int
    hashes: list[bytes]
    tokens: list[tuple[int, ...]]
    wanted: list[WantedBlock]
    """In ascending order of index."""
    held: list[Block]
    """Blocks found in the cache before the loaded ones, kept there until the load is done."""
    num_found_tokens: int
    """Tokens that a request finds in the cache without it."""
    num_saved_tokens: int
    """Tokens that need not be computed if all of it is loaded."""

    @property
    def names(self) -> list[BlockName]:
        return [wanted.name for wanted in self.wanted]


@dataclass(slots=True)
class _UnderWay:
    blocks: list[Block]
    """The blocks to load."""
    load: Load
    is_valid: bool = True
    """Whether what is loaded may be cached: there was no reset since it began."""


class Transfers(CacheObserver):
    """Loads and saves that are planned, and loads that are under way.

    A load holds references to its blocks, as a request does, until its result arrives. Loaded blocks are
    then cached content like any other, and a request finds them.

    A save holds nothing. The executor copies its blocks before it carries out anything else of the plan, so
    their places may be taken by the same plan. Only KV that an earlier plan has written is saved.
    """

    def __init__(self, kv: KVCacheManager, connector: KVConnector) -> None:
        self.step_id = 0
        """Of the plan that is being made; between plans, of the next one."""
        self._kv, self._pool, self._connector = kv, kv.pool, connector
        self._loads: list[Transfer] = []
        self._saves: dict[BlockName, int] = {}
        """Block ids by name."""
        self._held: list[Save] = []
        """Saves with tickets."""
        self._clears = False
        """All of these are for the next plan."""
        self._under_way: dict[int, _UnderWay] = {}
        self._owner: dict[BlockName, int] = {}
        """The load under way by name."""
        self._next_id = 1
        kv.pool.observers += (self,)

    @property
    def has_work(self) -> bool:
        """Whether loads are under way, or the executor has to be given saves with tickets or a reset."""
        return bool(self._under_way) or bool(self._held) or self._clears

    @property
    def is_held_for_others(self) -> bool:
        """Whether the next plan has saves with tickets."""
        return bool(self._held)

    def blocks(self) -> Iterator[Block]:
        """All blocks that loads hold."""
        for transfer in self._under_way.values():
            yield from transfer.blocks
            yield from transfer.load.held

    def take(self, plan: StepPlan) -> None:
        """Give the plan, which will be launched, its loads and saves."""
        plan.loads, self._loads = self._loads, []
        plan.saves, self._held = self._held, []
        if self._saves:
            names, block_ids = list(self._saves), list(self._saves.values())
            plan.saves.append(Save(names=names, block_ids=block_ids))
            self._saves = {}
        plan.clears_stores, self._clears = self._clears, False
        self.step_id = plan.step_id + 1

    def reset(self) -> None:
        """Cached content must not be found any more: save nothing of it, clear the stores, and do not use
        what is being loaded."""
        self._saves, self._clears = {}, True
        for transfer in self._under_way.values():
            transfer.is_valid = False

    # --- saves ------------------------------------------------------------------------------------

    def evicts(self, block: Block) -> None:
        content = block.content
        assert content is not None
        name = (content.block_hash, block.group)
        if self._can_be_saved(block) and self._connector.wants_evicted(name):
            self._saves[name] = block.block_id

    def _can_be_saved(self, block: Block) -> bool:
        content = block.content
        full = content is not None and len(content.tokens) == self._kv.block_size
        return full and block.step_id < self.step_id

    def found(self, contents: Sequence[BlockContent]) -> None:
        """A request begins with this content, which was in the cache."""
        for content in contents:
            content.num_hits += 1
        self._offer(contents)

    def left(self, request_id: int) -> None:
        """A request is about to release its blocks."""
        self._offer(self._kv.tables[request_id].contents)

    def _offer(self, contents: Iterable[BlockContent]) -> None:
        for content in contents:
            for group, block in enumerate(content.blocks):
                if block is not None and self._can_be_saved(block):
                    name = (content.block_hash, group)
                    if self._connector.wants_reused(name, content.num_hits):
                        self._saves[name] = block.block_id

    def hold(self, request_id: int) -> KVSource | None:
        """Save the full blocks of a request that is about to be released, for another instance."""
        kv, table = self._kv, self._kv.tables[request_id]
        reach = len(table.contents) * kv.block_size
        names, block_ids = [], []
        for index, content in enumerate(table.contents):
            for group, first in enumerate(table.first):
                if index < kv.first_read(group, reach):
                    continue
                # Outside the window of its last token, it may be inside that of its last full block.
                behind = index < first
                block = content.blocks[group] if behind else table.blocks[group][index]
                if block is None:
                    return None
                names.append((content.block_hash, group))
                block_ids.append(block.block_id)
        source = self._connector.hold(names, reach) if names else None
        if source is not None:
            self._held.append(Save(names=names, block_ids=block_ids, ticket=source.ticket))
        return source

    # --- loads ------------------------------------------------------------------------------------

    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        """As of a `KVConnector`. Stores that the plan being made will clear have nothing. What it will save
        can be loaded by the same plan."""
        if self._clears and source is None:
            return 0
        there = self._connector.lookup(names, source, start)
        while there < len(names) and names[there] in self._saves:
            while there < len(names) and names[there] in self._saves:
                there += 1
            there += self._connector.lookup(names[there:], source, start + there)
        return there

    def changes(self) -> list[TierChange]:
        """As of a `KVConnector`. What is about to be cleared has none."""
        return [] if self._clears else self._connector.changes()

    def find(
        self, request_id: int, token_ids: Sequence[int], key: CacheKey, source: KVSource | None
    ) -> Load | None:
        """The part of a request's prefix that the stores have and the cache does not."""
        kv, size, lookup = self._kv, self._kv.block_size, self.lookup
        chain = kv.find_chain(request_id, token_ids, key)
        known, full = len(chain), [g for g, window in enumerate(kv.windows) if window is None]
        # The last token is computed again. A window may then reach back further.
        most = (len(token_ids) - kv.has_windows) // size
        hashes = kv.hashes_of(request_id, token_ids, key)[:most]
        runs = (lookup([(name, group) for name in hashes[known:]], source, known) for group in full)

        def has(group: int, index: int) -> bool:
            if index < known and chain[index].blocks[group] is not None:
                return True
            return bool(lookup([(hashes[index], group)], source, index))

        count = kv.longest(min((min(known, most) + run for run in runs), default=most), has)
        wanted: list[WantedBlock] = []
        held: list[Block] = []
        for index in range(count):
            for group in range(len(kv.windows)):
                if index < kv.first_read(group, count * size):
                    continue
                block = chain[index].blocks[group] if index < known else None
                if block is None:
                    wanted.append(WantedBlock(index, group, (hashes[index], group)))
                else:
                    held.append(block)
        there = kv.longest(known, lambda group, index: chain[index].blocks[group] is not None)
        if not wanted or count <= there:
            return None
        start = min(wanted[0].index, known)
        tokens = [tuple(token_ids[i * size : (i + 1) * size]) for i in range(start, count)]
        return Load(
            parent=chain[start - 1] if start else key,
            start=start,
            hashes=hashes[start:count],
            tokens=tokens,
            wanted=wanted,
            held=held,
            num_found_tokens=there * size,
            num_saved_tokens=(count - there) * size,
        )

    def overlapping(self, load: Load) -> int | None:
        """The id of a load under way that has some of the same blocks."""
        return next((self._owner[name] for name in load.names if name in self._owner), None)

    def blocks_needed(self, load: Load) -> int:
        """The free blocks that it takes."""
        return len(load.wanted) + sum(1 for block in load.held if block.ref_count == 0)

    def num_held(self, transfer_id: int) -> int:
        transfer = self._under_way[transfer_id]
        return len(transfer.blocks) + len(transfer.load.held)

    def start(self, load: Load, source: KVSource | None, timeout: float) -> int:
        """Load it with the next plan, into free blocks. Returns the transfer's id. After it,
        `KVCacheManager.match_prefix` finds the blocks."""
        self._pool.acquire(load.held)
        blocks, names = self._pool.allocate(len(load.wanted)), load.names
        transfer_id, self._next_id = self._next_id, self._next_id + 1
        self._under_way[transfer_id] = _UnderWay(blocks, load)
        self._owner |= dict.fromkeys(names, transfer_id)
        transfer = Transfer(
            transfer_id=transfer_id,
            names=names,
            block_ids=[block.block_id for block in blocks],
            source=source,
            timeout=timeout,
        )
        self._loads.append(transfer)
        return transfer_id

    def is_under_way(self, transfer_id: int) -> bool:
        return transfer_id in self._under_way

    def finish(self, result: TransferResult) -> bool:
        """A load is over. Returns whether all of it was loaded."""
        transfer = self._under_way.pop(result.transfer_id)
        load, good = transfer.load, transfer.blocks[: result.num_good]
        for name in load.names:
            del self._owner[name]
        if transfer.is_valid:
            self._register(load, good)
        self._pool.release(reversed(load.held + transfer.blocks))
        return len(good) == len(load.wanted)

    def _register(self, load: Load, good: Iterable[Block]) -> None:
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
            parent = self._pool.register(blocks, block_hash, parent, tokens, self.step_id - 1)

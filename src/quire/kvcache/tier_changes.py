"""What tiers gain and lose, as changes of the prefix cache's index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from quire.kvcache.block import Block, BlockContent
from quire.kvcache.block_pool import BlockPool
from quire.kvcache.observer import CacheObserver, Change, ChangeKind
from quire.messages import TierChange

MOST_EVICTED = 16_384


class TierChanges(CacheObserver):
    """Adds to the changes of tiers the contents of the blocks, which tiers do not know.

    Most saves are complete only after the cache has evicted the block, so the contents that were evicted last
    are kept. A stored block whose content is not known is left out: what a disk has had from an earlier
    process.
    """

    def __init__(
        self,
        pool: BlockPool,
        take: Callable[[], Iterable[TierChange]],
        *,
        most_evicted: int = MOST_EVICTED,
    ) -> None:
        """take: as `KVConnector.changes`."""
        self._pool, self._take, self._most_evicted = pool, take, most_evicted
        self._evicted: dict[bytes, BlockContent] = {}
        pool.observers += (self,)

    def evicts(self, block: Block) -> None:
        assert block.content is not None
        self._evicted[block.content.block_hash] = block.content
        if len(self._evicted) > self._most_evicted:
            del self._evicted[next(iter(self._evicted))]

    def take(self) -> Iterator[Change]:
        for tier, (block_hash, group), is_stored in self._take():
            if not is_stored:
                yield Change(ChangeKind.REMOVED, None, group, tier, block_hash)
                continue
            content = self._pool.get(block_hash) or self._evicted.get(block_hash)
            if content is not None:
                yield Change(ChangeKind.STORED, content, group, tier)

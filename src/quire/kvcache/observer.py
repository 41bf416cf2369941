"""Changes of the prefix cache's index, for whoever wants to know them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from quire.kvcache.block import Block, BlockContent


class CacheObserver:
    """Called by `BlockPool` with every change of what is cached, in order."""

    def stored(self, content: BlockContent, group: int) -> None:
        """A block of this group has the content, or will have it when the step being planned is done."""

    def evicts(self, block: Block) -> None:
        """The block is handed out again, and loses its content: `removed` follows."""

    def removed(self, content: BlockContent, group: int) -> None:
        """No block of this group has the content any more."""

    def cleared(self, dropped: Sequence[BlockContent]) -> None:
        """Nothing is cached any more; this was."""


class ChangeStream(Protocol):
    """Publishes what a `CacheObserver` is told."""

    def flush(self, in_flight: Sequence[int]) -> None:
        """Publish the changes of steps that are done. in_flight: the ids of the others, in ascending
        order."""

    def close(self) -> None: ...


class ChangeKind(Enum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


class Change(NamedTuple):
    kind: ChangeKind
    content: BlockContent | None = None
    group: int = 0
    tier: str | None = None
    """Where: its label, or None for the cache. "Cleared" is of all."""
    removed: bytes = b""
    """The hash of a block that was removed from a tier; its content may be unknown."""

    @property
    def block_hash(self) -> bytes:
        return self.removed if self.content is None else self.content.block_hash


class ChangeLog(CacheObserver):
    """Collects changes of full blocks, and publishes them when the steps that compute them are done.

    publish: never blocks; False if it has dropped the changes. Then a reader's index is wrong, so the next
    changes are "all cleared", and everything that is cached.
    """

    def __init__(
        self,
        block_size: int,
        publish: Callable[[Sequence[Change]], bool],
        cached: Callable[[], Iterable[tuple[BlockContent, int]]],
        in_tiers: Callable[[], Iterable[Change]] = tuple,
    ) -> None:
        """cached: all that is. in_tiers: the tiers' changes since its last call."""
        self._block_size = block_size
        self._publish = publish
        self._cached, self._in_tiers = cached, in_tiers
        self._latest: list[Change] = []
        self._waiting: deque[tuple[int, list[Change]]] = deque()
        """Step -> changes to publish when it is done."""
        self._is_broken = False

    def stored(self, content: BlockContent, group: int) -> None:
        if len(content.tokens) == self._block_size:
            self._latest.append(Change(ChangeKind.STORED, content, group))

    def removed(self, content: BlockContent, group: int) -> None:
        if len(content.tokens) == self._block_size:
            self._latest.append(Change(ChangeKind.REMOVED, content, group))

    def cleared(self, dropped: Sequence[BlockContent]) -> None:
        self._latest.append(Change(ChangeKind.CLEARED))

    def flush(self, in_flight: Sequence[int]) -> None:
        if self._is_broken and (self._latest or self._waiting):
            self._waiting.clear()
            whole = [Change(ChangeKind.STORED, *each) for each in self._cached()]
            self._latest = [
                Change(ChangeKind.CLEARED),
                *(change for change in whole if self._is_full(change)),
            ]
            self._is_broken = False
        if self._latest:
            self._waiting.append((in_flight[-1] if in_flight else 0, self._latest))
            self._latest = []
        ready: list[Change] = []
        while self._waiting and (not in_flight or self._waiting[0][0] < in_flight[0]):
            ready += self._waiting.popleft()[1]
        ready += self._in_tiers()
        if ready and not self._publish(ready):
            self._is_broken = True

    def _is_full(self, change: Change) -> bool:
        return change.content is not None and len(change.content.tokens) == self._block_size

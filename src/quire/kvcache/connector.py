"""The scheduler's interface to stores of KV outside the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire.messages import BlockName, KVSource, TierChange, TierStats


class KVConnector(Protocol):
    """Decides what to move between the cache and stores outside it: host memory, a disk, another instance.

    It only decides, and never waits or raises. Plans carry the loads and saves, the executor performs them.
    A block's KV is identified by its name: the hash of its tokens and all tokens before them, under the
    request's `CacheKey`. A store must return the right KV for a name; if it does not have a name, that is a
    miss.
    """

    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        """The number of leading names that the stores probably have. No side effects. source: another
        instance that has the request's first `source.num_tokens` tokens. start: the index in the request of
        the block with the first name; those after it follow."""

    def seconds(self, num_blocks: int, source: KVSource | None = None) -> float:
        """The expected time to load so many blocks, by what was measured. 0.0 if nothing was."""

    def wants_evicted(self, name: BlockName) -> bool:
        """Whether to save a full block whose place in the cache is about to be taken."""

    def wants_reused(self, name: BlockName, hits: int) -> bool:
        """Whether to save a full block that stays in the cache. A request that uses it begins or ends now,
        and `hits` requests have found it there."""

    def expect(self, source: KVSource) -> None:
        """A request is queued that will load from there: its KV is to be kept until `release`."""

    def release(self, source: KVSource) -> None:
        """That request needs it no longer."""

    def hold(self, names: Sequence[BlockName], num_tokens: int) -> KVSource | None:
        """A ticket for the KV of these blocks, which are about to be saved: the full blocks of a request's
        first `num_tokens` tokens. None if they cannot be held."""

    def stats(self) -> dict[str, TierStats]:
        """The stores' state, and counts since the last call."""

    def changes(self) -> list[TierChange]:
        """What the tiers have stored and removed since the last call."""

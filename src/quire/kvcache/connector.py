"""The scheduler's interface to a store of KV outside the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire.messages import BlockName


class KVConnector(Protocol):
    """Decides what to move between the cache and a store outside it: host memory, a disk, another instance.

    It only decides, and never waits. Plans carry the transfers (`StepPlan.loads` and `saves`), the
    executor performs them, and its results report which blocks were moved. A block's KV is identified by
    its name: the hash of its tokens and all tokens before them, under the request's `CacheKey`. The store
    must return the right KV for a name; if it does not have a name, that is a miss.
    """

    def lookup(self, names: Sequence[BlockName]) -> int:
        """The number of leading names that the store has and that are worth loading. No side effects."""

    def on_evict(self, name: BlockName) -> bool:
        """Whether to save a block that is among the next to be reused."""

    def on_finish(self, request_id: int, names: Sequence[BlockName]) -> bool:
        """Whether to save the full blocks of a request that has ended. They are kept until they are saved."""

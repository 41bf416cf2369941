"""A store of KV outside the cache, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire.messages import BlockName


class KVConnector(Protocol):
    """Says what to move between the cache and a store outside it: host memory, a disk, another instance.

    It only decides, and never waits. Plans say what to move (`StepPlan.loads` and `saves`), the executor
    moves it, and its results say what arrived. KV goes by name: the hash of a block's tokens and of all
    before them, under the request's `CacheKey`. A store that has the wrong KV under a name is the only one
    who can give wrong KV; a name that it does not have is a miss.
    """

    def lookup(self, names: Sequence[BlockName]) -> int:
        """How many of these, from the first on, the store has and is worth loading from. No side effects."""

    def on_evict(self, name: BlockName) -> bool:
        """Whether to save a block that is among the next to be handed out."""

    def on_finish(self, request_id: int, names: Sequence[BlockName]) -> bool:
        """Whether to save the full blocks of a request that has ended. They stay until that is done."""

"""Why KV was not found in the cache.

A hit costs nothing here. A miss costs one look at the block that stopped the match: in the record of what was
evicted, and under other salts and adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quire.kvcache.block import BlockContent, CacheKey, hash_block
from quire.kvcache.manager import KVCacheManager
from quire.kvcache.observer import CacheObserver
from quire.kvcache.tables import PrefixMatch
from quire.messages import BlockName, KVSource, TransferResult
from quire.prefix_report import MissReason, PrefixReport

MOST_EVICTED = 32_768
"""The record has the latest evicted blocks, at least this many and at most twice as many: about 10 MB."""
MOST_KEYS = 32
"""The latest salts and adapters under which a missed block is looked up."""
MOST_HASHED = 64
"""Block hashes computed for that, about 1 us each."""

When = tuple[int, float]
"""Step id, clock."""


class Evictions(CacheObserver):
    """A bounded record of blocks that left the cache."""

    def __init__(self, most: int = MOST_EVICTED) -> None:
        self.now: When = (0, 0.0)
        self._most = most
        self._young: dict[bytes, When] = {}
        self._old: dict[bytes, When] = {}
        self._reset: frozenset[bytes] = frozenset()
        self._reset_at: When = self.now

    def removed(self, content: BlockContent, group: int) -> None:
        if any(content.blocks):
            return
        self._young[content.block_hash] = self.now
        if len(self._young) >= self._most:
            self._old, self._young = self._young, {}

    def cleared(self, dropped: Sequence[BlockContent]) -> None:
        self._reset = frozenset(content.block_hash for content in dropped)
        self._reset_at = self.now

    def find(self, block_hash: bytes) -> tuple[MissReason, When] | None:
        """How and when it last left the cache."""
        when = self._young.get(block_hash) or self._old.get(block_hash)
        if block_hash in self._reset and (when is None or when[0] <= self._reset_at[0]):
            return MissReason.RESET, self._reset_at
        return None if when is None else (MissReason.EVICTED, when)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loads that a request has waited for: usually one, perhaps another request's and then its own."""

    num_found: int
    """Tokens that the cache had before."""
    sources: dict[str, int]
    """Blocks by where they were, see `TransferResult`."""
    is_whole: bool
    """Whether the last one loaded all blocks."""
    late: bool

    @classmethod
    def after(
        cls, before: Loaded | None, num_found: int, is_whole: bool, result: TransferResult
    ) -> Loaded:
        """before: of the loads before this one, if there were any."""
        sources = dict(result.sources)
        for name, count in () if before is None else before.sources.items():
            sources[name] = sources.get(name, 0) + count
        return cls(num_found, sources, is_whole, result.late)


class Sought(Protocol):
    """The part of a request that matters here."""

    @property
    def request_id(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]:
        """The prompt."""

    @property
    def cache_key(self) -> CacheKey: ...

    @property
    def source(self) -> KVSource | None: ...

    @property
    def most_cached(self) -> int | None:
        """The most tokens that may be found; None for all."""


class Stores(Protocol):
    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        """As of a `KVConnector`."""


class Misses:
    """Makes the `PrefixReport` of each request at its first admission."""

    def __init__(
        self, kv: KVCacheManager, stores: Stores | None, clock: Callable[[], float]
    ) -> None:
        self._kv, self._stores, self._clock = kv, stores, clock
        self._roots: dict[CacheKey, bytes] = {}
        """The latest keys, in the order of their last use."""
        self._evictions = Evictions()
        if kv.enable_prefix_caching:
            kv.pool.observers += (self._evictions,)

    def step(self, step_id: int) -> None:
        self._evictions.now = (step_id, self._clock())

    def report(
        self, request: Sought, match: PrefixMatch, load: Loaded | None = None
    ) -> PrefixReport:
        """load: what the request waited for, if it did."""
        key = request.cache_key
        root = self._roots.pop(key, None) or key.root_hash
        self._roots[key] = root
        if len(self._roots) > MOST_KEYS:
            del self._roots[next(iter(self._roots))]
        found, total = match.num_tokens, len(request.token_ids)
        if found == total - 1:
            reason, when = MissReason.WHOLE, None
        else:
            reason, when = self._explain(request, found, load)
        step_id, ago = (0, 0.0) if when is None else (when[0], self._clock() - when[1])
        device, ram, disk, peer = _by_source(found, load)
        return PrefixReport(
            device=device, ram=ram, disk=disk, peer=peer, computed=total - found, reason=reason,
            since_step=step_id, seconds_ago=ago,
        )  # fmt: skip

    def _explain(
        self, request: Sought, found: int, load: Loaded | None
    ) -> tuple[MissReason, When | None]:
        """The reason, and when it happened if that is recorded. The block that stopped the match is the one
        with token `found`."""
        kv, size = self._kv, self._kv.block_size
        token_ids, most = request.token_ids, request.most_cached
        end = (found // size + 1) * size
        if not kv.enable_prefix_caching:
            return MissReason.OFF, None
        if most is not None and (found >= most or end > most + 1):
            return MissReason.CAPPED, None
        if end > len(token_ids):
            return MissReason.BOUNDARY, None
        key = request.cache_key
        block_hash = kv.hashes_of(request.request_id, token_ids, key)[end // size - 1]
        if kv.pool.get(block_hash) is not None:
            # It is the last block and was not copied, or a group of layers has lost its part.
            return MissReason.BOUNDARY if end == len(token_ids) else MissReason.EVICTED, None
        if load is not None and not load.is_whole:
            return MissReason.LOAD_LATE if load.late else MissReason.LOAD_FAILED, None
        if self._stores is not None and self._stores.lookup(
            [(block_hash, 0)], request.source, end // size - 1
        ):
            return MissReason.NOT_LOADED, None
        return self._evictions.find(block_hash) or (self._elsewhere(token_ids, end, key), None)

    def _elsewhere(self, token_ids: Sequence[int], end: int, key: CacheKey) -> MissReason:
        """Whether the prompt is cached up to `end` under another key. The work does not depend on what is
        cached there: else its time would tell a client about other clients' prompts."""
        size, reason = self._kv.block_size, MissReason.UNSEEN
        for other in list(self._roots)[-2 : -2 - MOST_HASHED * size // end : -1]:
            block_hash = self._roots[other]
            for start in range(0, end, size):
                block_hash = hash_block(block_hash, token_ids[start : start + size])
            if self._kv.pool.get(block_hash) is not None and reason is not MissReason.ADAPTER:
                reason = MissReason.ADAPTER if other.salt == key.salt else MissReason.SALT
        return reason


def _by_source(found: int, load: Loaded | None) -> tuple[int, int, int, int]:
    """The tokens found in the cache and loaded from RAM, disk and a peer: the loaded ones in the shares of
    their blocks, as a model with several groups of layers has several blocks for the same tokens."""
    if load is None or found <= load.num_found:
        return found, 0, 0, 0
    loaded = found - load.num_found
    blocks = load.sources
    total, ends, before = sum(blocks.values()), [], 0
    for name in ("ram", "disk"):
        before += blocks.get(name, 0)
        ends.append(loaded * before // total if total else loaded)
    return load.num_found, ends[0], ends[1] - ends[0], loaded - ends[1]

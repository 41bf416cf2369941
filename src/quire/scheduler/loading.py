"""Requests that wait while a part of their prefix is loaded from a store outside the cache.

A waiting request that would be admitted now, and whose prefix is in a store, waits until it is loaded, if
that is expected to take less time than to compute it. The others go on. Requests after it are admitted only
if enough blocks stay free for it. It waits no longer than computing these tokens would take, for its own load
or for another request's; whatever is there then is cached, and it computes the rest.

A load takes only blocks that no running request lacks, and none starts while one does. So if a running
request, without others after it that could be preempted, lacks blocks, it waits until a load is over, and
that is within the load's timeout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable

from quire.kvcache import KVCacheManager, KVConnector, Loaded, PrefixMatch, Transfers
from quire.messages import KVSource, TransferResult
from quire.scheduler.cost_model import CostModel
from quire.scheduler.request import Request

LEAST_TIMEOUT = 0.25
"""Seconds: less may be the noise of a thread that is not scheduled at once."""
FIRST_TIMEOUT = 10.0
"""Before a step that computes prompts has been measured."""
MOST_LOADS = 2
"""Of a request until it is admitted: what was loaded may be evicted before there is a seat for it."""


class Loading:
    """Which requests load what."""

    def __init__(
        self,
        kv: KVCacheManager,
        connector: KVConnector,
        costs: CostModel,
        clock: Callable[[], float],
    ) -> None:
        self.transfers = Transfers(kv, connector)
        self._kv, self._connector, self._costs, self._clock = kv, connector, costs, clock
        self._waits_for: dict[int, tuple[int, float]] = {}
        """By request: the id of the load, and until when it waits, which for its own is until the result."""
        self._found: dict[int, int] = {}
        """By request, the tokens that the cache had before its first load."""
        self._loaded: dict[int, Loaded] = {}
        """By request, what the loads were for which it has waited."""
        self._sources: dict[int, KVSource] = {}
        """Those whose leases are renewed, by request."""
        self._num_loads: Counter[int] = Counter()
        """By request, those that it has started since it was queued; the most if it will start no more. One
        that waits for another request's load may start its own after that."""

    def queued(self, request: Request) -> None:
        if (source := request.source) is not None:
            self._sources[request.request_id] = source
            self._connector.expect(source)

    def has_begun(self, request_id: int) -> bool:
        """Whether it waits for a load, or has waited for one."""
        return request_id in self._waits_for or request_id in self._loaded

    def blocks_to_come(self, request: Request, free: int, *, fits: bool) -> int | None:
        """None if the request does not wait for a load. Else the blocks that it will lack when the load is
        done. free: the blocks that it may take. fits: whether it would be admitted now; else it starts
        nothing, as what is loaded might be evicted before it is."""
        request_id = request.request_id
        transfer_id, until = self._waits_for.get(request_id, (None, math.inf))
        if transfer_id is not None and self._clock() > until:
            del self._waits_for[request_id]
            self._num_loads[request_id] = MOST_LOADS
            found = self._found[request_id]
            self._loaded[request_id] = Loaded(found, {}, is_whole=False, late=True)
            return None
        if transfer_id is None and fits and self._num_loads[request_id] < MOST_LOADS:
            transfer_id = self._start(request, free)
        if transfer_id is None:
            return None
        held = self.transfers.num_held(transfer_id)
        return max(0, self._kv.blocks_for(request.num_tokens) - held)

    def _start(self, request: Request, free: int) -> int | None:
        request_id, source = request.request_id, request.source
        if request.most_cached is not None or not self._kv.enable_prefix_caching:
            return None
        load = self.transfers.find(request_id, request.token_ids, request.cache_key, source)
        if load is None:
            self._num_loads[request_id] = MOST_LOADS
            return None
        seconds = self._costs.prompt_seconds(load.num_saved_tokens, load.num_found_tokens)
        timeout = max(LEAST_TIMEOUT, seconds) if seconds else FIRST_TIMEOUT
        until, transfer_id = self._clock() + timeout, self.transfers.overlapping(load)
        if transfer_id is None:
            num_blocks, until = len(load.wanted), math.inf
            too_slow = seconds and self._connector.seconds(num_blocks, source) >= seconds
            if too_slow or self.transfers.blocks_needed(load) > free:
                self._num_loads[request_id] = MOST_LOADS
                return None
            self._num_loads[request_id] += 1
            transfer_id = self.transfers.start(load, source, timeout)
        self._waits_for[request_id] = (transfer_id, until)
        self._found.setdefault(request_id, load.num_found_tokens)
        return transfer_id

    def finish(self, results: Iterable[TransferResult]) -> list[int]:
        """Loads are over. Returns the requests whose own load did not succeed."""
        failed = []
        for result in results:
            is_whole = self.transfers.finish(result)
            waiting = [r for r, (t, _) in self._waits_for.items() if t == result.transfer_id]
            for request_id in waiting:
                _, until = self._waits_for.pop(request_id)
                before = self._loaded.get(request_id)
                self._loaded[request_id] = Loaded.after(
                    before, self._found[request_id], is_whole, result
                )
                if not is_whole and until == math.inf:
                    self._num_loads[request_id] = MOST_LOADS
                    failed.append(request_id)
        return failed

    def admitted(self, request: Request, match: PrefixMatch) -> Loaded | None:
        """Returns what was loaded for it, if it has waited for that."""
        loaded = self._loaded.get(request.request_id)
        self.ended(request.request_id)
        request.source = (
            None  # what it had there is used or given up, also if the request is preempted
        )
        self.transfers.found(match.contents)
        return loaded

    def ended(self, request_id: int) -> None:
        """It no longer waits. What is being loaded for it will be cached."""
        for kept in (self._waits_for, self._found, self._loaded, self._num_loads):
            kept.pop(request_id, None)
        if (source := self._sources.pop(request_id, None)) is not None:
            self._connector.release(source)

    @property
    def is_under_way(self) -> bool:
        """Whether loads hold blocks, which will be free when they are over."""
        return any(True for _ in self.transfers.blocks())

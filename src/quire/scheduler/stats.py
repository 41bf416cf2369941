"""The scheduler's state in numbers, for metrics."""

from __future__ import annotations

from collections.abc import Sized

from quire.kvcache import KVCacheManager, KVConnector
from quire.messages import SchedulerStats
from quire.scheduler.queue import RequestQueue


def add_state(
    stats: SchedulerStats,
    kv: KVCacheManager,
    running: RequestQueue,
    waiting: Sized,
    num_deferred: int,
    connector: KVConnector | None,
) -> None:
    """Add the current state to counts. num_deferred: requests that the scheduler chose to let wait."""
    stats.num_running, stats.num_waiting = len(running), len(waiting)
    stats.waiting_by_reason = {
        "capacity": stats.num_waiting - num_deferred,
        "deferred": num_deferred,
    }
    stats.kv_tiers = {} if connector is None else connector.stats()
    stats.kv_usage = kv.usage
    stats.blocks_shared = kv.num_shared
    size = kv.block_size
    stats.kv_slots_allocated = kv.num_referenced * size
    unused = sum(
        kv.num_blocks_of(request.request_id) * size - request.num_computed_tokens
        for request in running
    )
    stats.kv_slots_used = stats.kv_slots_allocated - unused * len(kv.windows)

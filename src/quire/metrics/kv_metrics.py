"""Where prompts' KV came from, why the rest was not found, and the stores outside the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from quire.metrics.family import Family
from quire.prefix_report import MissReason, PrefixReport

if TYPE_CHECKING:
    from quire.messages import TierStats

SOURCES = {"device": "device", "ram": "host", "disk": "disk", "peer": "p2p"}
"""vLLM's names."""

TIER_GAUGES = {
    "blocks": ("quire:kv_tier_blocks", "Blocks in a store of KV outside the cache."),
    "bytes": ("quire:kv_tier_bytes", "Bytes that it takes, after compression."),
    "capacity_bytes": ("quire:kv_tier_capacity_bytes", "Bytes that it may take."),
    "is_off": ("quire:kv_tier_off", "1 if an error has ended its use."),
}
TIER_COUNTERS = {
    "saved_blocks": ("quire:kv_tier_saved_blocks", "Blocks put into it."),
    "loaded_blocks": ("quire:kv_tier_loaded_blocks", "Blocks loaded from it into the cache."),
    "evicted_blocks": ("quire:kv_tier_evicted_blocks", "Blocks that made room for others."),
    "dropped_blocks": ("quire:kv_tier_dropped_blocks", "Blocks offered to it and not kept."),
    "damaged_blocks": ("quire:kv_tier_damaged_blocks", "Blocks whose checksum was wrong."),
    "written_bytes": ("quire:kv_tier_written_bytes", "Bytes written, after compression."),
    "read_bytes": ("quire:kv_tier_read_bytes", "Bytes read, before decompression."),
}
"""Field of `TierStats` -> name and help."""


class KVMetrics:
    def __init__(self, make: Family) -> None:
        self._make = make
        self._cached = {
            name: make.counter(
                "vllm:prompt_tokens_cached_by_source",
                "Prompt tokens found in a cache, by where it was.",
                source=source,
            )
            for name, source in SOURCES.items()
        }
        self._queries = make.counter(
            "vllm:external_prefix_cache_queries",
            "Prompt tokens looked up in stores outside the prefix cache.",
        )
        self._hits = make.counter(
            "vllm:external_prefix_cache_hits",
            "Prompt tokens loaded from stores outside the prefix cache.",
        )
        reasons = [reason for reason in MissReason if reason is not MissReason.WHOLE]
        self._misses = {
            reason: (
                make.counter(
                    "quire:prefix_miss",
                    "Prompts computed in part or whole, by why.",
                    reason=reason.value,
                ),
                make.counter(
                    "quire:prefix_miss_tokens",
                    "Prompt tokens computed, by why they were not found.",
                    reason=reason.value,
                ),
            )
            for reason in reasons
        }
        self._tiers: dict[str, list[tuple[str, Callable[[float], None]]]] = {}

    def on_prefix(self, report: PrefixReport) -> None:
        for name, counter in self._cached.items():
            counter.inc(getattr(report, name))
        if self._tiers and report.reason not in (MissReason.CAPPED, MissReason.OFF):
            self._queries.inc(report.external + report.computed)
            self._hits.inc(report.external)
        if report.reason in self._misses:
            requests, tokens = self._misses[report.reason]
            requests.inc()
            tokens.inc(report.computed)

    def on_tiers(self, tiers: Mapping[str, TierStats]) -> None:
        for tier, stats in tiers.items():
            if tier not in self._tiers:
                self._tiers[tier] = self._of_tier(tier)
            for field, report in self._tiers[tier]:
                report(getattr(stats, field))

    def _of_tier(self, tier: str) -> list[tuple[str, Callable[[float], None]]]:
        """How each field is reported."""
        make = self._make
        gauges: dict[str, Gauge] = {
            field: make.gauge(*about, tier=tier) for field, about in TIER_GAUGES.items()
        }
        counters: dict[str, Counter] = {
            field: make.counter(*about, tier=tier) for field, about in TIER_COUNTERS.items()
        }
        return [(field, gauge.set) for field, gauge in gauges.items()] + [
            (field, counter.inc) for field, counter in counters.items()
        ]

"""The last minute of each engine core, second by second, and the latest latencies: what a page that has just
been opened can show. Of bounded size, and cheap enough to be kept whether or not anybody looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from quire.messages import SchedulerStats, StepOutputs, TierStats
from quire.metrics.request_stats import MetricsSink

SECONDS = 60
MOST_TENANTS = 64
"""Whose service is counted in a second; of more, the first that are reported."""
MOST_TOKEN_GAPS = 4096
MOST_FIRST_TOKENS = 512
_TIER_COUNTS = (
    "saved_blocks", "loaded_blocks", "evicted_blocks", "dropped_blocks", "damaged_blocks",
    "written_bytes", "read_bytes",
)  # fmt: skip


@dataclass(slots=True)
class Second:
    time: int
    steps: int = 0
    prompt_tokens: int = 0
    """Computed, without those found in the cache."""
    output_tokens: int = 0
    preemptions: int = 0
    drafts: int = 0
    drafts_accepted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    tenants: dict[str, float] = field(default_factory=dict)
    """Service charged, under the fair policy."""


COLUMNS = tuple(name for name in Second.__slots__ if name not in ("time", "tenants"))
_STATE = ("running", "waiting", "kv_usage")
"""Columns that hold on while no step ends."""


class Recent:
    """Of one engine core."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[Second] = deque(maxlen=SECONDS + 1)
        self.stats = SchedulerStats()
        """The latest."""
        self.tiers: dict[str, TierStats] = {}
        """The latest state, with the counts since the start."""

    def on_step(self, outputs: StepOutputs) -> None:
        second = self._second()
        second.steps += 1
        decode_rows = 0
        for update in outputs.updates:
            second.output_tokens += len(update.new_token_ids)
            decode_rows += update.prefix is None and bool(update.new_token_ids)
        if (stats := outputs.stats) is None:
            return
        self.stats = stats
        second.prompt_tokens += max(0, stats.step_tokens - decode_rows)
        second.preemptions += stats.num_preemptions
        second.prefix_queries += stats.prefix_queries
        second.prefix_hits += stats.prefix_hits
        second.running, second.waiting = stats.num_running, stats.num_waiting
        second.kv_usage = stats.kv_usage
        if stats.drafts is not None:
            second.drafts += stats.drafts.num_draft_tokens
            second.drafts_accepted += stats.drafts.num_accepted_tokens
        for tenant, each in stats.tenants.items():
            if tenant in second.tenants or len(second.tenants) < MOST_TENANTS:
                second.tenants[tenant] = second.tenants.get(tenant, 0.0) + each.charged
        for name, tier in stats.kv_tiers.items():
            before = self.tiers.get(name, TierStats())
            sums = {count: getattr(tier, count) + getattr(before, count) for count in _TIER_COUNTS}
            self.tiers[name] = msgspec.structs.replace(tier, **sums)

    def _second(self) -> Second:
        now = int(self._clock())
        if not self._seconds or self._seconds[-1].time != now:
            self._seconds.append(Second(now))
        return self._seconds[-1]

    def columns(self) -> dict[str, list[float]]:
        """Of each of the last `SECONDS` seconds, the current one last: what was counted in it."""
        now = int(self._clock())
        by_time = {second.time: second for second in self._seconds}
        columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        # State from before the first second shown, if it is known.
        last = next((s for s in reversed(self._seconds) if s.time <= now - SECONDS), Second(0))
        for at in range(now - SECONDS + 1, now + 1):
            second = by_time.get(at)
            last = second or last
            for name, column in columns.items():
                source = last if name in _STATE else second
                column.append(0 if source is None else round(getattr(source, name), 4))
        return columns

    def service(self) -> dict[str, float]:
        """What each tenant was charged in the last `SECONDS` seconds, under the fair policy."""
        start = int(self._clock()) - SECONDS
        total: dict[str, float] = {}
        for second in self._seconds:
            if second.time > start:
                for tenant, charged in second.tenants.items():
                    total[tenant] = total.get(tenant, 0.0) + charged
        return total


class Latencies:
    """The latest times to first token and between tokens, as they are reported to `/metrics`."""

    def __init__(self) -> None:
        self._ttft: deque[float] = deque(maxlen=MOST_FIRST_TOKENS)
        self._itl: deque[float] = deque(maxlen=MOST_TOKEN_GAPS)

    def beside(self, sink: MetricsSink) -> MetricsSink:
        """A sink that reports to `sink`, and here."""
        return _Both(sink, self._ttft, self._itl)

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Milliseconds, and of how many values."""
        return {"ttft": _percentiles(self._ttft), "itl": _percentiles(self._itl)}


class _Both:
    """Events that are not of interest go straight to the other sink, without a call of ours."""

    def __init__(self, sink: MetricsSink, ttft: deque[float], itl: deque[float]) -> None:
        self._sink, self._ttft, self._itl = sink, ttft, itl
        self.on_step, self.on_finished = sink.on_step, sink.on_finished
        self.on_rejected, self.on_sleep_state = sink.on_rejected, sink.on_sleep_state

    def on_first_token(
        self,
        ttft_seconds: float | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        external_tokens: int = 0,
    ) -> None:
        if ttft_seconds is not None:
            self._ttft.append(ttft_seconds)
        self._sink.on_first_token(
            ttft_seconds,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            external_tokens=external_tokens,
        )

    def on_token_gap(self, seconds: float) -> None:
        self._itl.append(seconds)
        self._sink.on_token_gap(seconds)


def _percentiles(values: deque[float]) -> dict[str, float]:
    """The least value that is at least as large as that share of them."""
    ordered = sorted(values)
    found: dict[str, float] = {"count": len(ordered)}
    if ordered:
        for percent in (50, 90, 99):
            index = max(0, -(-len(ordered) * percent // 100) - 1)
            found[f"p{percent}"] = round(1000.0 * ordered[index], 3)
    return found

"""What waits, and how long it will wait: for refusals at the front door, metrics and autoscaling.

A request waits for two things. The prompts before it are computed at a rate that the cost model predicts; and
if no seat or blocks are free, requests before it take the places of those that end, at the rate at which
those have ended lately. Both go on at the same time, so the wait is the longer of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from quire.messages import LoadStats, SchedulerStats
from quire.scheduler.decisions import Wait, WaitReason
from quire.scheduler.latency import PART, LatencyTarget
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.queue import RequestQueue
from quire.scheduler.rates import Rates
from quire.scheduler.request import Request

EVERY_SECONDS = 0.1
"""It is computed anew so often, since it reads the whole queue."""
MEMORY = 7 / 8
"""What a step that admits leaves of the weight of those before it."""
_NO_PLACE = frozenset({WaitReason.BLOCKS, WaitReason.SEAT, WaitReason.COST})


class Load:
    def __init__(
        self,
        limits: SchedulerLimits,
        latency: LatencyTarget,
        rates: Rates,
        clock: Callable[[], float],
    ) -> None:
        self._limits, self._latency, self._rates, self._clock = limits, latency, rates, clock
        self._asked = self._found = 0.0
        """Prompt tokens of the last admitted requests, and those that the cache held."""
        self._next = -math.inf
        self._is_idle = False
        self._last = LoadStats()

    def now(
        self,
        stats: SchedulerStats,
        running: RequestQueue,
        waiting: Iterable[Request],
        stopped: Wait | None,
    ) -> LoadStats:
        """stats: with the counts since the last call. stopped: why admission stopped in the last step."""
        if stats.prefix_queries:
            self._asked = MEMORY * self._asked + stats.prefix_queries
            self._found = MEMORY * self._found + stats.prefix_hits
        now, was_idle = self._clock(), self._is_idle
        self._is_idle = not stats.num_running and not stats.num_waiting
        if now >= self._next or (self._is_idle and not was_idle):
            self._next = now + EVERY_SECONDS
            self._last = self._compute(stats, running, waiting, stopped)
        return self._last

    def _compute(
        self,
        stats: SchedulerStats,
        running: RequestQueue,
        waiting: Iterable[Request],
        stopped: Wait | None,
    ) -> LoadStats:
        uncached = 1 - self._found / self._asked if self._asked else 1.0
        queued = sum(
            request.num_tokens
            for request in waiting
            if request.fork_of is None or request.was_admitted  # else another computes its prompt
        )
        left = [request.num_tokens - request.num_computed_tokens for request in running]
        has_places = stopped is None or stopped.reason not in _NO_PLACE
        load = LoadStats(
            queue_tokens=round(uncached * queued),
            first_tokens=next((count for count in left if count > 1), 0),
            uncached=uncached,
            free_seats=self._limits.max_num_seqs - len(left) if has_places else 0,
            prompt_rate=self._latency.prompt_rate(running),
            end_rate=self._rates.ends_per_second,
            step_predicted=self._latency.cost.predicted,
            step_target=self._latency.target,
        )
        seats = seats_needed(load, stats.num_waiting)
        seconds = wait_seconds(load, tokens_before(load, load.queue_tokens), seats)
        return msgspec.structs.replace(load, wait_seconds=seconds)


def tokens_before(load: LoadStats, queued: float) -> float:
    """Tokens of prompts that are computed until so many of the queue are. The first of the running prompts
    comes before them, but leaves the queue a part. The others advance as the queue does: as many of their
    tokens are computed as are left of the queue's when its last one starts."""
    return min(queued + load.first_tokens, queued / PART)


def seats_needed(load: LoadStats, num_waiting: int) -> int:
    """Requests that have to end until one that comes now has a place."""
    return max(0, num_waiting + 1 - load.free_seats)


def wait_seconds(load: LoadStats, tokens: float, seats: float) -> float:
    """Until so many tokens of prompts are computed and so many requests have ended. What was never measured
    does not count."""
    computed = tokens / load.prompt_rate if load.prompt_rate else 0.0
    ended = seats / load.end_rate if load.end_rate else 0.0
    return max(computed, ended)

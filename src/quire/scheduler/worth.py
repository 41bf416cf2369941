"""Whether to admit a request now that may soon have to give its blocks back.

If running requests need more blocks than are free, the last of the order is preempted, and that is usually
who was admitted last. Its blocks are taken one after the other, and when it returns they are loaded from a
tier or computed again. Until then it has computed tokens beside others, in steps that would have taken
nearly as long without it. So there are two alternatives, in seconds:

* gain: admitted now, it has a row in every step until it is preempted, or until a request ends, which is when
  it would be admitted otherwise.
* cost: what it will have lost when it returns, times the probability that no request ends before the free
  blocks are used up.

All is measured: the time of steps by their rows, how often requests end, the time of prompt tokens and of
loads, and which part of a preempted request was lost. A request that is before a running one in the order is
always admitted, for it would not be the one to be preempted; so is any if nothing runs. No request after one
that waits is admitted.
"""

from __future__ import annotations

import math

from quire.kvcache import KVCacheManager, KVConnector, Loaded
from quire.scheduler.cost_model import CostModel
from quire.scheduler.decisions import Wait, WaitReason
from quire.scheduler.queue import RequestQueue
from quire.scheduler.rates import Rates
from quire.scheduler.request import Request

HYSTERESIS = 1.5
"""Once requests wait, the gain must be so many times the cost before the next is admitted."""
LOST = 0.5
"""The part of a preempted request that is assumed to be computed again, before one has returned."""
MEMORY = 7 / 8
LEAST_STEPS = 32.0
"""Without prompts, before anything is decided by their times."""


class Worth:
    def __init__(
        self, kv: KVCacheManager, costs: CostModel, rates: Rates, connector: KVConnector | None
    ) -> None:
        self._kv, self._costs, self._rates, self._connector = kv, costs, rates, connector
        self.least_steps = LEAST_STEPS
        self._lost, self._loaded = LOST, 0.0
        """The parts of preempted requests that were computed again and loaded."""
        self._holds = False

    def resume_seconds(self, num_tokens: int) -> float:
        """What it is expected to take until a preempted request has its KV again."""
        seconds = self._lost * self._costs.prompt_seconds(num_tokens)
        if self._connector is not None and self._loaded:
            blocks = self._loaded * num_tokens * len(self._kv.windows) / self._kv.block_size
            seconds += self._connector.seconds(int(blocks))
        return seconds

    def returned(self, num_tokens: int, num_found: int, load: Loaded | None) -> None:
        """A preempted request runs again: so many of its tokens are in the cache. load: what it has waited
        for."""
        num_loaded = 0 if load is None else max(0, num_found - load.num_found)
        self._lost += (1 - MEMORY) * (1 - num_found / num_tokens - self._lost)
        self._loaded += (1 - MEMORY) * (num_loaded / num_tokens - self._loaded)

    def wait(self, request: Request, running: RequestQueue, left: int) -> Wait | None:
        """None if it is worth it, or not the last in the order. left: the blocks that are free once it is
        admitted."""
        num_running = len(running)
        if not num_running or self._costs.num_steps < self.least_steps:
            self._holds = False
            return None
        if request.sort_key < running[num_running - 1].sort_key:
            return None
        rows = num_running + 1
        steps = left * self._kv.block_size / (rows * len(self._kv.windows))
        ends = max(self._rates.ends_per_step, 1e-6)
        lasts = math.exp(-ends * steps)
        gain = (1 - lasts) / ends * self._costs.row_gain(num_running)
        cost = lasts * self.resume_seconds(request.num_tokens)
        self._holds = gain < cost * (HYSTERESIS if self._holds else 1.0)
        if not self._holds:
            return None
        last = running[num_running - 1].request_id
        return Wait(WaitReason.COST, last, free=left, gain=gain, cost=cost)

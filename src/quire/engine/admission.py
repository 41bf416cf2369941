"""Refusals at the front door: what would wait too long, or has no room in the queue, is refused before
anything is allocated for it, with the time after which to ask again.

The predicted wait is that of `scheduler/load.py`, by the state that the core reported last and the requests
sent since then. Under the fair policy it is the tenant's own: what it has queued itself, at the part of the
rate that it gets beside the other tenants with requests queued.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from quire.config import SchedulerConfig
from quire.engine.input_processor import EngineRequest
from quire.engine.output_processor import OutputProcessor
from quire.engine.queue_share import Share
from quire.errors import MOST_RETRY_SECONDS, QueueFullError
from quire.messages import SchedulerStats
from quire.scheduler.latency import PART
from quire.scheduler.load import seats_needed, tokens_before, wait_seconds

JITTER = 0.2
"""Of Retry-After, up and down: clients that were refused together do not come back together."""
LEAST_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class _Sent:
    """Requests that the core has not reported yet."""

    count: int = 0
    tokens: int = 0


class Admission:
    def __init__(
        self,
        limits: SchedulerConfig,
        output: OutputProcessor,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """output: knows the live requests. chance: a number from 0 to 1."""
        self._limits, self._output, self._chance = limits, output, chance
        self._stats = SchedulerStats()
        self._since, self._before = _Sent(), _Sent()
        """What was sent since the last report, and between the two before it: the core takes messages between
        steps, and reports after a step."""

    def sent(self, request: EngineRequest) -> None:
        self._since.count += len(request.sequences)
        self._since.tokens += len(request.prompt_token_ids)

    def reported(self, stats: SchedulerStats) -> None:
        """The core has taken a step."""
        self._stats = stats
        self._before, self._since = self._since, _Sent()

    def check(self, request: EngineRequest) -> None:
        """Raises `QueueFullError` if too much would wait with `request` and its tenant would have more than
        its share of it, or if the request would wait too long."""
        limits, place = self._limits, request.placement
        live, queued = self._output.live_sequences, self._output.queued_tokens
        more = max(1, len(request.sequences))
        if limits.max_num_queued_reqs:
            most = limits.max_num_seqs + limits.max_num_queued_reqs
            share = live.exceeded(most, more, place.tenant, place.weight)
            if share is not None:
                self._refuse_share(
                    "max_num_queued_reqs",
                    f"{live.total} sequences run or wait and this request adds {more}; "
                    f"the server takes {most} (--max-num-seqs plus --max-num-queued-reqs).",
                    share,
                    request,
                )
        if limits.max_num_queued_tokens and live.total >= limits.max_num_seqs:
            most, more = limits.max_num_queued_tokens, len(request.prompt_token_ids)
            share = queued.exceeded(most, more, place.tenant, place.weight)
            if share is not None:
                self._refuse_share(
                    "max_num_queued_tokens",
                    f"{queued.total + more} prompt tokens would wait; the server queues "
                    f"{most} (--max-num-queued-tokens).",
                    share,
                    request,
                )
        if limits.max_ttft:
            wait = self.wait(request)
            if wait > limits.max_ttft:
                self._refuse(
                    "max_ttft",
                    f"The request would wait about {wait:.1f} s before it starts; the server lets none wait "
                    f"longer than {limits.max_ttft:g} s (--max-ttft).",
                    wait,
                )

    def wait(self, request: EngineRequest | None = None) -> float:
        """Seconds until a request that comes now starts. None: one of any tenant and size."""
        load, sent = self._stats.load, (self._before, self._since)
        num_queued = self._stats.num_waiting + sum(each.count for each in sent)
        queued = load.queue_tokens + load.uncached * sum(each.tokens for each in sent)
        seats: float = seats_needed(load, num_queued)
        tokens = tokens_before(load, queued)
        if request is not None:
            # Longer prompts before it leave it a part of each step once they run.
            size = len(request.prompt_token_ids)
            tokens = min(tokens, (num_queued + 1) * size / PART)
            if self._limits.scheduling_policy == "fair":
                own_tokens, own_requests, part = self._own(request)
                tokens = min(tokens, load.uncached * own_tokens / part)
                seats = min(seats, (own_requests + 1) / part)
        return wait_seconds(load, tokens, seats)

    def _own(self, request: EngineRequest) -> tuple[int, int, float]:
        """Prompt tokens and requests of its tenant without a first token, and the part of the service that
        the tenant gets while it and the others have some."""
        tenant, weight = request.placement.tenant, request.placement.weight
        tokens, requests = self._output.queued_tokens, self._output.queued_requests
        return tokens.of(tenant), requests.of(tenant), requests.fraction(tenant, weight)

    def _refuse_share(
        self, reason: str, message: str, share: Share, request: EngineRequest
    ) -> None:
        message = f"The queue is full: {message}"
        if share.num_tenants == 1:
            self._refuse(reason, message, self.wait())
        message += (
            f" You have {share.held}; your share is {share.most}, "
            f"as {share.num_tenants} tenants have requests."
        )
        self._refuse(reason, message, self.wait(request))

    def _refuse(self, reason: str, message: str, wait: float) -> NoReturn:
        self._output.metrics.on_rejected(reason)
        seconds = min(max(LEAST_RETRY_SECONDS, wait), MOST_RETRY_SECONDS / (1 + JITTER))
        seconds *= 1 + JITTER * (2 * self._chance() - 1)
        raise QueueFullError(message, retry_after=seconds)

"""More and longer requests than there are KV blocks."""

from __future__ import annotations

from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.metrics import read_metrics

REQUESTS = 20


class PoolExhaustion(Fault):
    """Requests wait or are preempted, and their answers are the same."""

    name = "pool-exhaustion"

    async def strike(self, site: Site, draw: Random) -> Struck:
        before = read_metrics(await site.server.text("/metrics"))
        calls = [draw.choice(site.large) for _ in range(REQUESTS)]
        ended = await site.load.send_all(calls)
        after = read_metrics(await site.server.text("/metrics"))
        preempted = after.sum("vllm:num_preemptions_total") - before.sum(
            "vllm:num_preemptions_total"
        )
        return Struck({"sent": dict(ended), "preemptions": int(preempted)})

"""Requests for more adapters than are in memory: each is read, evicted, read again, and answers the same."""

from __future__ import annotations

from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck

REQUESTS = 24


class AdapterChurn(Fault):
    name = "adapter-churn"

    def unavailable(self, site: Site) -> str:
        return site.no_adapters

    async def strike(self, site: Site, draw: Random) -> Struck:
        ended = await site.load.send_all([draw.choice(site.adapted) for _ in range(REQUESTS)])
        return Struck({"sent": dict(ended)})

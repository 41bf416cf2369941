"""Clients that read answers a few bytes at a time: nobody else waits for them, and they get all of it."""

from __future__ import annotations

from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.wire import Pace

CLIENTS = 6


class SlowReaders(Fault):
    name = "slow-readers"

    async def strike(self, site: Site, draw: Random) -> Struck:
        streams = [call for call in site.large if call.stream]
        calls = [draw.choice(streams) for _ in range(CLIENTS)]
        pace = Pace(size=draw.choice([16, 64]), pause=0.05, seconds=draw.uniform(2, 4))
        before = site.load.count
        ended = await site.load.send_all(calls, pace=pace)
        return Struck({"slow": dict(ended), "meanwhile": site.load.count - before - CLIENTS})

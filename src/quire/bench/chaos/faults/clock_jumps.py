"""The wall clock jumps forward and back: nothing that is answered, measured or waited for depends on it."""

from __future__ import annotations

import asyncio
import time
from email.utils import parsedate_to_datetime
from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck

HOUR = 3600
JUMPS = (5, 90, HOUR, 26 * HOUR, 400 * 24 * HOUR)
SHOWN_SECONDS = 10.0
"""Until the Date of answers shows a jump; the server looks once a second."""


class ClockJumps(Fault):
    name = "clock-jumps"

    def unavailable(self, site: Site) -> str:
        return site.clock.reason

    async def strike(self, site: Site, draw: Random) -> Struck:
        shifts = [draw.choice(JUMPS) * draw.choice([1, -1]) for _ in range(3)]
        problems = []
        try:
            for shift in shifts:
                site.clock.set(shift)
                await asyncio.sleep(draw.uniform(0.5, 1.5))
            if not await _is_shown(site, shifts[-1]):
                problems.append(f"the Date of answers does not show the jump by {shifts[-1]} s")
        finally:
            site.clock.set(0)
        return Struck({"shifts_s": shifts}, problems)


async def _is_shown(site: Site, shift: int) -> bool:
    """Whether the fault is one: the server's processes have the shifted clock."""
    for _ in range(int(SHOWN_SECONDS / 0.2)):
        headers = await site.server.headers("/version")
        if "date" in headers:
            date = parsedate_to_datetime(headers["date"]).timestamp()
            if abs(date - shift - time.time()) < 3:
                return True
        await asyncio.sleep(0.2)
    return False

"""The disk of the KV tier is full: the tier is given up, and the server goes on without it."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.metrics import read_metrics
from quire.bench.chaos.server import DISK_BYTES
from quire.bench.chaos.workload import fresh_calls

REQUESTS, MOST_REQUESTS = 8, 64


class FullDisk(Fault):
    name = "full-disk"

    def unavailable(self, site: Site) -> str:
        return site.no_disk

    async def strike(self, site: Site, draw: Random) -> Struck:
        filler = site.server.disk / "filler"
        try:
            was_off, taken, sent = await _is_off(site), fill(filler), 0
            is_off = was_off
            while not is_off and sent < MOST_REQUESTS:
                await site.load.send_all(fresh_calls(draw, REQUESTS))
                sent, is_off = sent + REQUESTS, await _is_off(site)
        finally:
            filler.unlink(missing_ok=True)
        details = {"filled_bytes": taken, "was_off": was_off, "is_off": is_off, "new_prompts": sent}
        return Struck(details)


async def _is_off(site: Site) -> bool:
    metrics = read_metrics(await site.server.text("/metrics"))
    return bool(metrics.sum("quire:kv_tier_off", 'tier="disk"'))


def fill(path: Path) -> int:
    """Write until the file system is full. Returns the bytes. Raises `OSError` for any other error."""
    taken = 0
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while taken < 2 * DISK_BYTES:
                    taken += file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return taken

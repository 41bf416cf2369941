"""Many clients that leave at random points, some of them rudely."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from contextlib import suppress
from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.wire import Address, Call

CLIENTS = 32
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s. Closing sends RST instead of FIN."""


class DisconnectStorm(Fault):
    name = "disconnect-storm"

    async def strike(self, site: Site, draw: Random) -> Struck:
        calls = [draw.choice([*site.small, *site.large]) for _ in range(CLIENTS)]
        points = await asyncio.gather(
            *(_leave(site.server.address, call, Random(draw.random())) for call in calls)
        )
        return Struck({"left": dict(Counter(points))})


async def _leave(address: Address, call: Call, draw: Random) -> str:
    """Where it left."""
    point = draw.choice(["in the request", "before the answer", "in the answer", "in the answer"])
    message = call.message(address.name)
    await asyncio.sleep(draw.uniform(0, 0.5))
    with suppress(OSError, TimeoutError):
        reader, writer = await address.connect()
        try:
            async with asyncio.timeout(20):
                if point == "in the request":
                    writer.write(message[: draw.randrange(len(message))])
                    await writer.drain()
                else:
                    writer.write(message)
                    await writer.drain()
                    if point == "in the answer":
                        await reader.readexactly(draw.randrange(1, 4000))
                await asyncio.sleep(draw.expovariate(5))
        except asyncio.IncompleteReadError:
            point = "after the answer"
        finally:
            if draw.random() < 0.5:
                place = writer.get_extra_info("socket")
                place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.close()
        return point
    return "no connection"

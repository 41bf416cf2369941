"""The file of API keys changes while requests run: a key more, a mistake, a key less."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from time import monotonic

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.metrics import read_metrics
from quire.bench.chaos.server import keys_text
from quire.bench.chaos.workload import TENANTS

MODELS = "/v1/models"
TAKES_EFFECT_SECONDS = 15.0
"""docs/tenants.md says 2; a machine under chaos may be busy."""


class KeyReloads(Fault):
    name = "key-reloads"

    async def strike(self, site: Site, draw: Random) -> Struck:
        server, key = site.server, f"spare-{draw.getrandbits(64):x}"
        others = list(TENANTS.values())
        problems: list[str] = []
        seconds: dict[str, float] = {}

        async def expect(what: str, holds: Callable[[], Awaitable[bool]]) -> None:
            started = monotonic()
            while not await holds():
                if monotonic() - started > TAKES_EFFECT_SECONDS:
                    problems.append(f"{what}: not within {TAKES_EFFECT_SECONDS:g} s")
                    return
                await asyncio.sleep(0.1)
            seconds[what] = round(monotonic() - started, 2)

        async def admits(*keys: str) -> bool:
            return all([(await server.get(MODELS, key=key)).status == 200 for key in keys])

        async def refuses_the_spare() -> bool:
            return (await server.get(MODELS, key=key)).status == 401

        async def is_current(expected: float) -> bool:
            metrics = read_metrics(await server.text("/metrics"))
            return metrics.sum("quire:api_keys_file_current") == expected

        try:
            server.write_keys(keys_text([(draw.choice(list(TENANTS)), key)]))
            await expect("a new key is admitted", lambda: admits(key))
            server.write_keys(draw.choice(["[[keys]\n", "", 'x = "', keys_text() + "[[keys]]\n"]))
            await expect("a file with a mistake is reported", lambda: is_current(0))
            await expect("its old keys hold", lambda: admits(key, *others))
        finally:
            server.write_keys(keys_text())
        await expect("a removed key is refused", refuses_the_spare)
        await expect("the others are admitted", lambda: admits(*others))
        await expect("the file is current", lambda: is_current(1))
        return Struck({"seconds": seconds}, problems)

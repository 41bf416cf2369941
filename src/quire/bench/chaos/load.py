"""Clients that send requests while a fault strikes, and remember how each ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from quire.bench.chaos.wire import Address, Call, Kind, Outcome, Pace, ask

PAUSE_SECONDS = 0.2
"""Of a client that was refused or could not connect."""


class Load:
    """`start`, then `stop`, which waits for what is in flight; any number of times."""

    def __init__(
        self,
        address: Callable[[], Address],
        calls: Sequence[Call],
        *,
        seed: int,
        concurrency: int,
        deadline: float,
    ) -> None:
        """address: asked for every request; a server that was started again has another port.
        deadline: seconds after which a request without an end is stuck."""
        self._address = address
        self._calls = calls
        self._seed = seed
        self._concurrency = concurrency
        self._deadline = deadline
        self._goes_on = False
        self._workers: list[asyncio.Task[None]] = []
        self._outcomes: list[Outcome] = []
        self._period = 0

    def start(self) -> None:
        self._goes_on = True
        self._period += 1
        self._workers = [
            asyncio.create_task(self._send(Random(f"{self._seed}/load/{self._period}/{number}")))
            for number in range(self._concurrency)
        ]

    async def _send(self, draw: Random) -> None:
        while self._goes_on:
            outcome = await ask(self._address(), draw.choice(self._calls), deadline=self._deadline)
            self._outcomes.append(outcome)
            if outcome.kind is not Kind.ANSWER:
                await asyncio.sleep(PAUSE_SECONDS)

    async def stop(self) -> None:
        self._goes_on = False
        await asyncio.gather(*self._workers)
        self._workers = []

    async def send_all(self, calls: Sequence[Call], *, pace: Pace | None = None) -> Counter[str]:
        """These at once, beside what is sent anyway. How many ended how."""
        address = self._address()
        outcomes = await asyncio.gather(
            *(ask(address, call, deadline=self._deadline, pace=pace) for call in calls)
        )
        self._outcomes += outcomes
        return Counter(outcome.kind.value for outcome in outcomes)

    @property
    def count(self) -> int:
        """Outcomes that nobody has taken yet."""
        return len(self._outcomes)

    def take(self) -> list[Outcome]:
        """What ended since the last call."""
        taken, self._outcomes = self._outcomes, []
        return taken

"""What the dashboard shows, as JSON: one look at the engine a second, shared by all who watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from quire.errors import QuireError
from quire.messages.state import CoreState
from quire.server.state import ServerState
from quire.util.version import VERSION

INTERVAL = 0.9
"""Seconds between two looks, at least."""
MOST_SHARE = 0.005
"""Of an engine core's time that is spent on being looked at. If a look takes longer, they are rarer."""
PATIENCE = 1.5
"""Seconds to wait for cores that are in a step; then the last state is shown, with its age."""


@runtime_checkable
class InspectedEngine(Protocol):
    """An engine whose cores show their state."""

    async def inspect(self) -> list[CoreState]: ...


class StateView:
    """Nothing is asked while nobody watches, and never a second question before the first is answered."""

    def __init__(self, state: ServerState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._clock = state, clock
        self._cores: dict[int, CoreState] = {}
        self._seen: float | None = None
        """When the cores' state came."""
        self._looking: asyncio.Task[None] | None = None
        self._due = 0.0
        self._body = b""

    async def body(self) -> bytes:
        if self._clock() >= self._due or not self._body:
            await self._look()
            self._body = msgspec.json.encode(self._shown())
            cost = max((core.cost_seconds for core in self._cores.values()), default=0.0)
            self._due = self._clock() + max(INTERVAL, cost / MOST_SHARE)
        return self._body

    async def _look(self) -> None:
        if self._looking is None:
            self._due = self._clock() + PATIENCE  # others who come meanwhile get the last one
            self._looking = asyncio.create_task(self._ask())
            self._looking.add_done_callback(self._looked)
        await asyncio.wait([self._looking], timeout=PATIENCE)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None

    async def _ask(self) -> None:
        engine = self._state.engine
        if not isinstance(engine, InspectedEngine) or engine.is_dead:
            return
        try:
            states = await engine.inspect()
        except QuireError:  # it has died: its state says so
            return
        self._cores = {core.replica: core for core in states}
        self._seen = self._clock()

    def _shown(self) -> dict[str, object]:
        state, engine = self._state, self._state.engine
        shown: dict[str, object] = {
            "version": VERSION,
            "phase": state.phase.value,
            "failure": state.failure,
            "unix_time": round(time.time(), 3),
            "age_seconds": None if self._seen is None else round(self._clock() - self._seen, 3),
            "answering": len(state.live),
            "latency_ms": state.latencies.percentiles(),
            "replicas": [],
        }
        if engine is None:
            return shown
        health = engine.health(state.config.health_timeout)
        shown |= {"model": engine.model.name, "max_model_len": engine.model.max_model_len}
        shown["engine"] = health.reason
        shown["served_adapters"] = [adapter.name for adapter in engine.adapters]
        shown["replicas"] = [
            {
                "replica": index,
                "state": health.replicas[index] if index < len(health.replicas) else "ok",
                "core": self._cores.get(index),
                "seconds": recent.columns(),
                "service": recent.service(),
                "tiers": recent.tiers,
                "load": recent.stats.load,
            }
            for index, recent in enumerate(state.recents)
        ]
        return shown

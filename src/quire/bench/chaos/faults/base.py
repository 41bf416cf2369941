"""What a fault is, and what it may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from quire.bench.chaos.clock import WallClock
from quire.bench.chaos.load import Load
from quire.bench.chaos.server import Server
from quire.bench.chaos.wire import Call, Kind

RESTARTING = frozenset({Kind.ERROR, Kind.REFUSAL})
"""How a request may end beside an answer, while an engine core is replaced."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a fault may disturb."""

    server: Server
    load: Load
    small: Sequence[Call]
    large: Sequence[Call]
    adapted: Sequence[Call]
    clock: WallClock
    no_disk: str
    """Why the disk tier has no file system of its own; empty: it has."""
    no_adapters: str
    """Why there are no adapters; empty: there are."""


@dataclass(frozen=True, slots=True)
class Struck:
    details: Mapping[str, object] = field(default_factory=dict)
    """For the report."""
    problems: Sequence[str] = ()
    """What the server should have done and did not."""


class Fault(ABC):
    """One kind of disturbance. It begins while requests run, and is over when `strike` returns."""

    name: ClassVar[str]
    tolerates: ClassVar[Collection[Kind]] = ()
    """How requests of others may end beside an answer."""
    ends_core: ClassVar[bool] = False
    """Whether the engine core is replaced."""

    def unavailable(self, site: Site) -> str:
        """Why it cannot be done here; empty: it can."""
        return ""

    @abstractmethod
    async def strike(self, site: Site, draw: Random) -> Struck:
        """Do it. All choices come from `draw`."""

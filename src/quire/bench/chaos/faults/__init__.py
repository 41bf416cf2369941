"""The faults, by name."""

from __future__ import annotations

from quire.bench.chaos.faults.adapters import AdapterChurn
from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.faults.clock_jumps import ClockJumps
from quire.bench.chaos.faults.core import (
    CrashCore,
    HangCore,
    HangWorker,
    KillCore,
    KillCoreTwice,
    KillWorker,
    PauseCore,
    PauseWorker,
)
from quire.bench.chaos.faults.disconnects import DisconnectStorm
from quire.bench.chaos.faults.disk import FullDisk
from quire.bench.chaos.faults.keys import KeyReloads
from quire.bench.chaos.faults.malformed import MalformedRequests
from quire.bench.chaos.faults.pool import PoolExhaustion
from quire.bench.chaos.faults.slow_readers import SlowReaders
from quire.errors import ConfigError

FAULTS: dict[str, type[Fault]] = {
    fault.name: fault
    for fault in (
        DisconnectStorm,
        SlowReaders,
        PauseCore,
        KillCore,
        CrashCore,
        KillCoreTwice,
        HangCore,
        PauseWorker,
        KillWorker,
        HangWorker,
        PoolExhaustion,
        MalformedRequests,
        ClockJumps,
        FullDisk,
        KeyReloads,
        AdapterChurn,
    )
}


def create_faults(names: tuple[str, ...]) -> list[Fault]:
    """All if none is named. Raises `ConfigError`."""
    for name in names:
        if name not in FAULTS:
            raise ConfigError(f"--faults: there is no {name!r}. There are {', '.join(FAULTS)}.")
    return [FAULTS[name]() for name in names or FAULTS]


__all__ = ["FAULTS", "Fault", "Site", "Struck", "create_faults"]

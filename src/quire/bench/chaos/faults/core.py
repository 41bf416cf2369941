"""Signals to the engine core and the worker ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from random import Random
from time import monotonic

from quire.bench.chaos.faults.base import RESTARTING, Fault, Site, Struck
from quire.bench.chaos.server import READY_SECONDS
from quire.errors import EngineError


class KillCore(Fault):
    """SIGKILL: the front end starts another core, and requests go on."""

    name = "kill-core"
    tolerates = RESTARTING
    ends_core = True
    role = "core"
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)

    async def strike(self, site: Site, draw: Random) -> Struck:
        await asyncio.sleep(draw.uniform(0, 1))
        victims = site.server.pids(self.role)
        if not victims:
            return Struck(problems=[f"there is no {self.role} process"])
        victim, sent = draw.choice(victims), draw.choice(self.signals)
        os.kill(victim, sent)
        struck = await replaced(site, victim)
        return Struck({"signal": sent.name, **struck.details}, struck.problems)


class CrashCore(KillCore):
    """What a fault in the core itself looks like: its requests are suspected, and go on one after another."""

    name = "crash-core"
    signals = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


class KillCoreTwice(KillCore):
    """SIGKILL, and again to the next core, while it loads or has just begun."""

    name = "kill-core-twice"

    async def strike(self, site: Site, draw: Random) -> Struck:
        pause = draw.uniform(0, 4)
        (first,) = site.server.pids("core")
        os.kill(first, signal.SIGKILL)
        while not (cores := [pid for pid in site.server.pids("core") if pid != first]):
            if site.server.exit_status() is not None:
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(pause)
        for pid in cores:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        struck = await replaced(site, cores[0] if cores else first)
        return Struck({"pause_s": round(pause, 2), **struck.details}, struck.problems)


class HangCore(Fault):
    """SIGSTOP until --core-hang-timeout has passed: counts as a death."""

    name = "hang-core"
    tolerates = RESTARTING
    ends_core = True
    role = "core"

    async def strike(self, site: Site, draw: Random) -> Struck:
        victim = draw.choice(site.server.pids(self.role))
        os.kill(victim, signal.SIGSTOP)
        try:
            return await replaced(site, victim)
        finally:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)


class PauseCore(Fault):
    """SIGSTOP for a moment: all is late, nothing is lost, and the front end answers probes."""

    name = "pause-core"
    role = "core"

    async def strike(self, site: Site, draw: Random) -> Struck:
        victim = draw.choice(site.server.pids(self.role))
        seconds = draw.uniform(0.3, 2.5)
        os.kill(victim, signal.SIGSTOP)
        try:
            started = monotonic()
            probe = await site.server.get("/health")
            probed = monotonic() - started
            await asyncio.sleep(max(0.0, seconds - probed))
        finally:
            os.kill(victim, signal.SIGCONT)
        problems = []
        if probe.status not in (200, 503):  # the process goes on only after the answer
            problems.append(
                f"/health: {probe.status} after {probed:.2f} s while the core stood still"
            )
        return Struck({"paused_s": round(seconds, 2), "health_ms": round(1000 * probed)}, problems)


class _OfWorker(Fault):
    """The same to a rank that only follows the core's plans."""

    role = "worker"

    def unavailable(self, site: Site) -> str:
        return "" if site.server.pids("worker") else "there is one rank (-tp 2 has two)"


class KillWorker(_OfWorker, KillCore):
    """The core notices, and all ranks are replaced."""

    name = "kill-worker"


class HangWorker(_OfWorker, HangCore):
    """Until --worker-timeout has passed: the core notices, and all ranks are replaced."""

    name = "hang-worker"


class PauseWorker(_OfWorker, PauseCore):
    name = "pause-worker"


async def replaced(site: Site, victim: int) -> Struck:
    """Wait until `victim` has ended and the server is ready with other processes."""
    started = monotonic()
    gone = 0.0
    while monotonic() - started < READY_SECONDS:
        if site.server.exit_status() is not None:
            status = site.server.exit_status()
            return Struck(problems=[f"the server exited with {status} instead of starting a core"])
        pids = [process.pid for process in site.server.processes()]
        if victim not in pids:
            gone = gone or monotonic()
            if site.server.pids("core"):
                break
        await asyncio.sleep(0.05)
    else:
        return Struck(problems=[f"no other core after {READY_SECONDS:g} s"])
    try:
        await site.server.wait_ready()
    except EngineError as error:
        return Struck(problems=[str(error)])
    return Struck(
        {"gone_s": round(gone - started, 2), "ready_again_s": round(monotonic() - started, 2)}
    )

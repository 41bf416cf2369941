"""The run: an undisturbed server's answers, then fault after fault, each followed by the invariants. At the
end the server leaves under load, comes back, leaves again, gives up after one death too many, is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from random import Random
from time import monotonic

from quire.bench.chaos import processes
from quire.bench.chaos.clock import WallClock
from quire.bench.chaos.faults import Fault, Site, Struck, create_faults
from quire.bench.chaos.growth import growths
from quire.bench.chaos.invariants import Evidence, answers_equal, ended_once, is_settled, violations
from quire.bench.chaos.load import Load
from quire.bench.chaos.metrics import read_metrics
from quire.bench.chaos.options import ChaosOptions
from quire.bench.chaos.processes import Sample
from quire.bench.chaos.report import ProcessReport, Report, Strike
from quire.bench.chaos.server import STOP_SECONDS, Server, small_disk
from quire.bench.chaos.wire import Answer, Kind, Outcome
from quire.bench.chaos.workload import adapted_calls, large_calls, record, small_calls
from quire.errors import EngineError

STUCK_SECONDS = 120.0
"""A request without an end for so long is stuck. A restart of the core is far shorter."""
SETTLE_SECONDS = 20.0
"""After the last request's end, until the gauges are at zero."""
BEFORE, AFTER = 0.5, 0.5
"""Seconds of load before and after a fault."""
GIVE_UP_EXITS = 3
"""Unexpected ends of the server after which a run ends."""
ORPHAN_SECONDS = 30.0
"""After the front end's death, until the others have ended."""
PROBES = ("/health", "/ready")
LEAVING = frozenset({Kind.REFUSAL, Kind.UNREACHABLE, Kind.DROPPED})


async def run_chaos(options: ChaosOptions, folder: Path, say: Callable[[str], None]) -> Report:
    """say: called with a line of progress. Raises `EngineError` if the server does not start or does not
    answer undisturbed."""
    with small_disk(folder / "disk") as no_disk:
        clock = WallClock(folder)
        server = Server(options, folder, clock)
        run = _Run(options, server, clock, no_disk, say)
        try:
            return await run.run()
        finally:
            server.kill()


class _Run:
    def __init__(
        self,
        options: ChaosOptions,
        server: Server,
        clock: WallClock,
        no_disk: str,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._server = server
        self._say = say
        small, large = small_calls(options.seed), large_calls(options.seed)
        adapted = () if server.no_adapters else adapted_calls(options.seed)
        self._calls = (*small, *large, *adapted)
        load = Load(
            lambda: server.address,
            small,
            seed=options.seed,
            concurrency=options.concurrency,
            deadline=STUCK_SECONDS,
        )
        self._site = Site(server, load, small, large, adapted, clock, no_disk, server.no_adapters)
        self._answers: dict[str, Answer] = {}
        self._report = Report(options, server.command()[1:])
        self._samples: dict[tuple[int, str], list[tuple[float, Sample]]] = {}
        self._started = 0.0
        self._exits = 0

    async def run(self) -> Report:
        self._server.start()
        self._say(f"ready after {await self._server.wait_ready():.1f} s")
        self._started = monotonic()
        self._answers = await record(self._server.address, self._calls)
        self._say(f"{len(self._answers)} undisturbed answers after {self._now():.1f} s")
        await self._strike(Undisturbed(), Random(0))
        try:
            await self._strike_all()
        except EngineError as error:  # a server that was started again did not get ready
            self._report.strikes.append(Strike("start", self._now(), 0.0, {}, {}, [str(error)]))
        self._report.seconds = self._now()
        self._report.processes = self._processes()
        return self._report

    async def _strike_all(self) -> None:
        begun = self._now()
        for number, fault in enumerate(self._order()):
            if self._exits >= GIVE_UP_EXITS:
                return
            if self._now() - begun > self._options.seconds:
                break
            await self._strike(fault, Random(f"{self._options.seed}/{number}/{fault.name}"))
        await self._leave_and_return()
        await self._give_up()
        await self._vanish()

    def _now(self) -> float:
        return monotonic() - self._started

    def _order(self) -> Iterator[Fault]:
        """All faults that can be done, in another order in each round. Two rounds of three leave the engine
        core alive, so that growth of its memory can be seen."""
        able = []
        for fault in create_faults(self._options.faults):
            if reason := fault.unavailable(self._site):
                self._report.skipped[fault.name] = reason
                self._say(f"skipped: {fault.name}: {reason}")
            else:
                able.append(fault)
        mild = [fault for fault in able if not fault.ends_core]
        draw = Random(f"{self._options.seed}/order")
        while able:
            for faults in (able, mild, mild):
                draw.shuffle(faults)
                yield from faults

    async def _strike(self, fault: Fault, draw: Random) -> None:
        """The fault under load, then quiet, then the invariants."""
        at, load = self._now(), self._site.load
        load.start()
        await asyncio.sleep(BEFORE)
        try:
            struck = await fault.strike(self._site, draw)
        except EngineError as error:  # the server did not answer
            struck = Struck(problems=[str(error)])
        await asyncio.sleep(AFTER)
        await load.stop()
        evidence = await self._settled(fault.tolerates)
        found = [*struck.problems, *violations(evidence)]
        self._note(fault.name, at, evidence, struck, found)
        if evidence.exit_status is None:
            self._take_samples()
        else:
            self._exits += 1
            if self._exits < GIVE_UP_EXITS:
                await self._start_again()

    async def _settled(self, tolerates: Collection[Kind]) -> Evidence:
        """The evidence, as soon as all is quiet or `SETTLE_SECONDS` have passed."""
        outcomes = self._site.load.take()
        started = monotonic()
        while True:
            evidence = await self._look(outcomes, tolerates)
            late = monotonic() - started > SETTLE_SECONDS
            if late or evidence.exit_status is not None or is_settled(evidence):
                return evidence
            await asyncio.sleep(0.1)

    async def _look(self, outcomes: Sequence[Outcome], tolerates: Collection[Kind]) -> Evidence:
        server = self._server
        try:
            metrics = read_metrics(await server.text("/metrics"))
        except EngineError:
            metrics = None
        statuses = {path: (await server.get(path)).status for path in PROBES}
        alive = server.processes()
        return Evidence(
            outcomes,
            self._answers,
            tolerates,
            metrics,
            statuses,
            server.exit_status(),
            processes.zombies([process.pid for process in alive]),
            Counter(process.role for process in alive),
            server.expected_roles,
        )

    def _note(
        self, name: str, at: float, evidence: Evidence, struck: Struck, found: list[str]
    ) -> None:
        ended = Counter(each.kind.value for each in evidence.outcomes)
        strike = Strike(
            name, round(at, 1), round(self._now() - at, 1), dict(ended), struck.details, found
        )
        self._report.strikes.append(strike)
        counts = ", ".join(f"{count} {kind}" for kind, count in ended.items())
        about = " ".join(f"{key}={value}" for key, value in struck.details.items())
        self._say(f"{at:7.1f} s  {name:<20}{'FAILED' if found else 'ok':<7}{counts}  {about}")
        for text in found:
            self._say(f"    VIOLATION {text}")

    def _take_samples(self) -> None:
        for process in self._server.processes():
            if (taken := processes.sample(process.pid)) is not None:
                key = (process.pid, process.role)
                self._samples.setdefault(key, []).append((self._now(), taken))

    def _processes(self) -> list[ProcessReport]:
        lives: Counter[str] = Counter()
        found = []
        for (_, role), samples in self._samples.items():
            lives[role] += 1
            if figures := growths(samples):
                found.append(ProcessReport(role, lives[role], figures))
        return found

    async def _start_again(self) -> None:
        self._say(self._server.log_tail())
        self._server.kill()
        self._server.start()
        await self._server.wait_ready()

    # --- the end ---

    async def _leave_and_return(self) -> None:
        """SIGTERM under load: what runs is finished, and nothing is left. The next server finds the disk
        tier's files and gives the same answers."""
        at, load = self._now(), self._site.load
        load.start()
        await asyncio.sleep(1)
        status = await self._server.stop()
        await load.stop()
        found = self._after_end(status, 0)
        evidence = Evidence(load.take(), self._answers, LEAVING)
        found += ended_once(evidence) + answers_equal(evidence)
        self._note("drain", at, evidence, Struck(), found)
        at = self._now()
        self._server.kill()
        self._server.start()
        seconds = await self._server.wait_ready()
        await load.send_all(self._calls)
        evidence = await self._settled(())
        status = await self._server.stop()
        found = violations(evidence) + self._after_end(status, 0)
        self._note("restart", at, evidence, Struck({"ready_s": round(seconds, 2)}), found)

    async def _give_up(self) -> None:
        """A core's death that is one too many: requests end with a typed error, and the server with 1."""
        at, load = self._now(), self._site.load
        self._server.start(max_core_deaths=1)
        await self._server.wait_ready()
        load.start()
        await asyncio.sleep(1)
        for pid in self._server.pids("core"):
            os.kill(pid, signal.SIGKILL)
        status = await self._server.wait_end(STOP_SECONDS)
        await load.stop()
        evidence = Evidence(load.take(), self._answers, LEAVING | {Kind.ERROR})
        found = self._after_end(status, 1) + ended_once(evidence) + answers_equal(evidence)
        self._note("last death", at, evidence, Struck(), found)

    async def _vanish(self) -> None:
        """SIGKILL to the front end: its other processes notice, and leave nothing."""
        at, load = self._now(), self._site.load
        self._server.start()
        await self._server.wait_ready()
        load.start()
        await asyncio.sleep(1)
        for pid in self._server.pids("front end"):
            os.kill(pid, signal.SIGKILL)
        status = await self._server.wait_end(STOP_SECONDS)
        await load.stop()
        until = monotonic() + ORPHAN_SECONDS
        while self._server.left_behind() and monotonic() < until:
            await asyncio.sleep(0.1)
        evidence = Evidence(load.take(), self._answers, LEAVING | {Kind.BROKEN})
        found = self._after_end(status, -signal.SIGKILL) + answers_equal(evidence)
        self._note("kill front end", at, evidence, Struck(), found)

    def _after_end(self, status: int | None, expected: int) -> list[str]:
        found = [] if status == expected else [f"the server exited with {status}, not {expected}"]
        return found + [f"left behind: {text}" for text in self._server.left_behind()]


class Undisturbed(Fault):
    """No fault: what runs together answers as what ran alone."""

    name = "none"

    async def strike(self, site: Site, draw: Random) -> Struck:
        await site.load.send_all([*site.small, *site.large])
        return Struck()

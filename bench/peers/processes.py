"""A runner process as the driver sees it: asked in JSON lines, stopped while others are measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.peers.rivals import REPOSITORY, Spec

_TICKS = os.sysconf("SC_CLK_TCK")


class RunnerError(RuntimeError):
    """The runner answered an error, took too long, or is gone."""


class Runner:
    """One engine's process. It lies stopped (SIGSTOP, with its children) except inside `awake`."""

    def __init__(self, spec: Spec, command: list[str], log: Path) -> None:
        self.spec = spec
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **spec.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.perf_counter()
        # Should memory run out, one of these goes, and nobody else's work on this machine.
        Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("900")
        self._buffer = b""

    def wait_ready(self, timeout: float) -> dict[str, object]:
        """Its first message, with `first_answer_s`: from the start of the process to an answered request."""
        message = self._read(timeout)
        return {**message, "first_answer_s": time.perf_counter() - self.started}

    def ask(self, timeout: float, **command: object) -> dict[str, object]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise RunnerError(f"{self.spec.name} is gone: {error}") from error
        return self._read(timeout)

    def _read(self, timeout: float) -> dict[str, object]:
        """One line of JSON. Read from the descriptor itself: a buffered reader could not be timed."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RunnerError(f"{self.spec.name} gave no answer within {timeout:.0f} s.")
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise RunnerError(f"{self.spec.name} ended; its log says why.")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, object] = json.loads(line)
        if "error" in message:
            raise RunnerError(str(message["error"]))
        return message

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self, patience: float = 30) -> None:
        """End it: asked first, then, after so many seconds, with force."""
        self.wake()
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(b'{"command": "quit"}\n')
            self.process.stdin.close()
            self.process.wait(timeout=patience)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds since boot: of everything, and of chosen process groups."""

    busy: float
    stolen: float
    ours: float
    at: float


def cpu_times(groups: set[int]) -> CpuTimes:
    """Reads /proc. `groups` are session leaders whose processes count as ours, this one with them, and
    so do their descendants in sessions of their own (Quire's engine core).
    """
    fields = [int(x) / _TICKS for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    stats: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                stats[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
    ours = 0.0
    for pid, stat in stats.items():
        if pid == os.getpid():
            ours += (int(stat[11]) + int(stat[12])) / _TICKS
        elif _belongs(pid, stats, groups):
            # With children that ended, or their time would be missing later.
            ours += sum(int(ticks) for ticks in stat[11:15]) / _TICKS
    return CpuTimes(user + nice + system + irq + softirq, steal, ours, time.monotonic())


def _belongs(pid: int, stats: Mapping[int, list[str]], groups: set[int]) -> bool:
    while pid in stats:
        if int(stats[pid][3]) in groups:
            return True
        pid = int(stats[pid][1])
    return False


def others_share(before: CpuTimes, after: CpuTimes) -> float:
    """How many cores' worth of time went to processes that are not ours, or to the host's other guests."""
    seconds = max(after.at - before.at, 1e-9)
    other = (after.busy - before.busy) - (after.ours - before.ours) + after.stolen - before.stolen
    return max(0.0, other / seconds)

"""The server as a child process: `quire serve` with little memory for KV, both tiers, two tenants, adapters,
and a clock that can be moved."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from quire.bench.chaos import processes
from quire.bench.chaos.adapters import write_adapters
from quire.bench.chaos.clock import WallClock
from quire.bench.chaos.options import ChaosOptions
from quire.bench.chaos.wire import Address, Call, Outcome, Reply, ask
from quire.bench.chaos.workload import TENANTS
from quire.builtin import MODEL_DIR
from quire.errors import EngineError
from quire.util.environment import child_environment

READY_SECONDS = 180.0
STOP_SECONDS = 60.0
PROBE_SECONDS = 10.0
DISK_BYTES = 24 << 20
"""Of the file system of the disk tier."""
BODY_BYTES = 256 << 10
MANY_DEATHS = 1_000_000
"""Of engine cores, in a run that kills them all the time."""
HANG_SECONDS = 12.0
"""After which a core that stands still is replaced. Longer than a probe may take."""
_LISTENING = re.compile(r"listening on http://([\d.]+):(\d+)")


class Server:
    """Started and stopped any number of times in one folder."""

    def __init__(self, options: ChaosOptions, folder: Path, clock: WallClock) -> None:
        self._options = options
        self._folder = folder
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = secrets.token_hex(8)
        self._address: Address | None = None
        self._starts = 0
        self.keys_file = folder / "keys.toml"
        self.disk = folder / "disk"
        self._adapters = folder / "adapters"
        model = Path(options.model or MODEL_DIR)
        self.no_adapters = write_adapters(model, self._adapters, options.seed)
        """Why there are none; empty: there are."""
        self.scratch = folder / "tmp"
        """The server's directory for temporary files; empty while it does not run."""
        for each in (self.disk, self.scratch):
            each.mkdir(mode=0o700, exist_ok=True)
        self.write_keys(keys_text())

    # --- its life ---

    def command(self, *, max_core_deaths: int = MANY_DEATHS) -> list[str]:
        model = [self._options.model] if self._options.model else []
        flags = {
            "host": "127.0.0.1",
            "port": 0,
            "api-keys-file": self.keys_file,
            "num-gpu-blocks-override": 80,
            "max-model-len": 1024,
            "max-num-seqs": 16,
            "max-num-queued-reqs": 96,
            "swap-space": 0.005,
            "kv-disk-path": self.disk,
            "kv-disk-size": 0.016,
            "max-body-bytes": BODY_BYTES,
            "shutdown-timeout": 45,
            "tensor-parallel-size": self._options.tensor_parallel_size,
            "max-core-deaths": max_core_deaths,
            "core-hang-timeout": HANG_SECONDS,
            "worker-timeout": HANG_SECONDS,
            "health-timeout": HANG_SECONDS / 2,
        }
        switches = ["--disable-uvicorn-access-log"]
        if not self.no_adapters:
            flags |= {"lora-dir": self._adapters, "max-loras": 2, "max-cpu-loras": 3}
            switches.append("--enable-lora")
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, "-m", "quire", "serve", *model, *words, *switches]

    def start(self, *, max_core_deaths: int = MANY_DEATHS) -> None:
        self._starts += 1
        self._address = None
        environment = child_environment() | self._clock.environment
        environment |= {processes.MARK: self._mark, "TMPDIR": str(self.scratch)}
        environment["QUIRE_LOG_LEVEL"] = "INFO"  # its port is in the log
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(max_core_deaths=max_core_deaths),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    async def wait_ready(self, seconds: float = READY_SECONDS) -> float:
        """Seconds until /ready answered 200. Raises `EngineError` if it has ended or takes too long."""
        started = monotonic()
        while True:
            if (status := self.exit_status()) is not None:
                raise EngineError(f"the server exited with {status}:\n{self.log_tail()}")
            if self._find_address() and (await self.get("/ready")).status == 200:
                return monotonic() - started
            if monotonic() - started > seconds:
                raise EngineError(
                    f"the server is not ready after {seconds:g} s:\n{self.log_tail()}"
                )
            await asyncio.sleep(0.05)

    async def stop(self) -> int | None:
        """SIGTERM. Its exit status, or None if it did not end in time."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
        return await self.wait_end(STOP_SECONDS)

    async def wait_end(self, seconds: float) -> int | None:
        started = monotonic()
        while (status := self.exit_status()) is None and monotonic() - started < seconds:
            await asyncio.sleep(0.05)
        return status

    def kill(self) -> None:
        """All its processes, if any are left."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
                os.kill(process.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def exit_status(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    # --- what it has ---

    @property
    def expected_roles(self) -> dict[str, int]:
        workers = self._options.tensor_parallel_size - 1
        return {"front end": 1, "core": 1, "worker": workers}

    @property
    def address(self) -> Address:
        assert self._address is not None, "the server has been ready"
        return self._address

    def _find_address(self) -> bool:
        if self._address is None:
            with suppress(OSError):
                found = _LISTENING.search(self._log.read_text("utf-8", "replace"))
                if found:
                    self._address = Address(found[1], int(found[2]))
        return self._address is not None

    def processes(self) -> list[processes.Process]:
        return processes.find(self._mark)

    def pids(self, role: str) -> list[int]:
        return [process.pid for process in self.processes() if process.role == role]

    @property
    def _log(self) -> Path:
        return self._folder / f"server-{self._starts}.log"

    def log_tail(self, lines: int = 15) -> str:
        text = self._log.read_text("utf-8", "replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def left_behind(self) -> list[str]:
        """After its end: processes and files that should not be there."""
        alive = [f"{process.role} process {process.pid}" for process in self.processes()]
        return alive + [f"file {path.name} in its TMPDIR" for path in self.scratch.iterdir()]

    # --- questions ---

    async def get(self, path: str, *, key: str = "") -> Outcome:
        """A GET, judged by its status only; `status` is 0 if there was no answer."""
        outcome, _ = await self._fetch(path, key)
        return outcome

    async def text(self, path: str) -> str:
        """The body of a GET. Raises `EngineError`."""
        outcome, reply = await self._fetch(path, "")
        if outcome.status != 200:
            raise EngineError(f"GET {path}: {outcome.status or outcome.detail or 'no answer'}")
        return reply.body.decode("utf-8", "replace")

    async def headers(self, path: str) -> dict[str, str]:
        """Of the answer; names in lower case. Empty if there was none."""
        return (await self._fetch(path, ""))[1].headers

    async def _fetch(self, path: str, key: str) -> tuple[Outcome, Reply]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reply = Reply()
        call = Call(path, path, b"", headers)
        return await ask(self.address, call, deadline=PROBE_SECONDS, reply=reply), reply

    # --- its keys ---

    def write_keys(self, text: str) -> None:
        """As an editor does it: the file is replaced, so that no reader sees half of it."""
        new = self.keys_file.with_suffix(".new")
        new.write_text(text, "utf-8")
        new.replace(self.keys_file)


def keys_text(extra: Sequence[tuple[str, str]] = ()) -> str:
    """The file of keys: the two tenants', and more as (tenant, key)."""
    tables = ["[tenants.red]\nweight = 2\n", "[tenants.blue]\n"]
    for tenant, key in [*TENANTS.items(), *extra]:
        digest = hashlib.sha256(key.encode()).hexdigest()
        tables.append(f'[[keys]]\nsha256 = "{digest}"\ntenant = "{tenant}"\n')
    return "\n".join(tables)


@contextmanager
def small_disk(path: Path) -> Iterator[str]:
    """A file system of its own at `path`, so that it can be full. Yields why there is none, or "" ."""
    path.mkdir(mode=0o700, exist_ok=True)
    done = None
    if os.geteuid() == 0:
        with suppress(OSError):
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(path)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
    if done is None or done.returncode:
        yield "only root may mount a small file system" if done is None else done.stderr.strip()
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)

"""The demo's server: `quire serve` in its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import quire
from quire.cli.http import HttpClient
from quire.errors import EngineError
from quire.server.upstream import HttpError

READY_SECONDS = 180.0
STOP_SECONDS = 20.0
LOG_LINES_SHOWN = 20


class ServerProcess:
    """Started by `start`, ready after `wait_ready`, ended by `stop`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._started = time.monotonic()
        self.url = url
        self.client = HttpClient(url)

    @classmethod
    def start(cls, options: Mapping[str, object], folder: Path) -> ServerProcess:
        """Launch with `options` (flat names), by default on a free port; config and log go to `folder`.

        The options are written to a `--config` file as JSON, which is YAML.
        """
        port = options.get("port") or _free_port()
        settings = {"disable_uvicorn_access_log": True, "uvicorn_log_level": "warning", **options}
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings | {"host": "127.0.0.1", "port": port}))
        with (folder / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "quire", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # on Ctrl-C, this process stops it
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _package_root()},
            )
        return cls(process, f"http://127.0.0.1:{port}", folder)

    @property
    def pid(self) -> int:
        """Also of its process group."""
        return self._process.pid

    def wait(self) -> int:
        """Until it ends. Its exit status."""
        return self._process.wait(STOP_SECONDS)

    async def wait_ready(self) -> float:
        """Seconds from launch until /ready answered 200. Raises `EngineError` with the log if that fails."""
        while True:
            if self._process.poll() is not None:
                raise EngineError(
                    f"the server left with code {self._process.returncode}:\n{self.log()}"
                )
            try:
                await self.client.get("/ready")
                return time.monotonic() - self._started
            except HttpError:
                pass
            if time.monotonic() - self._started > READY_SECONDS:
                raise EngineError(
                    f"the server is not ready after {READY_SECONDS:g} s:\n{self.log()}"
                )
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Send SIGTERM and wait. Raises `EngineError` if the process does not exit cleanly."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise EngineError(f"the server ignored SIGTERM for {STOP_SECONDS:g} s.") from None
        if code != 0:
            raise EngineError(f"the server left with code {code}:\n{self.log()}")

    def log(self) -> str:
        """The last lines that the server wrote."""
        text = (self._folder / "server.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES_SHOWN:]) or "(it wrote nothing)"


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="quire-demo-")


def _package_root() -> str:
    """The folder to import from, so that the server runs this package, installed or not."""
    roots = [str(Path(quire.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(root for root in roots if root)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port

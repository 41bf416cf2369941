"""Prefill and decode instances and their proxy, as processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from unittest import mock

import httpx
from tests.free_ports import free_ports

from quire.cli.demo.server import ServerProcess

LOADS_PAY = str(Path(__file__).with_name("loads_pay"))
SMALL = {
    "max_num_seqs": 8, "kv_cache_memory_bytes": "16M", "cpu_threads": 1, "max_model_len": 1024,
    "worker_timeout": 300,
}  # fmt: skip
BUSY = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "quire:kv_tier_bytes",
)  # fmt: skip


class Side:
    """One instance, which may be killed and started again at its port."""

    def __init__(self, options: Mapping[str, object], folder: Path) -> None:
        self._options, self._folder = {"port": free_ports(1), **options}, folder
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(parents=True)
        with mock.patch.dict(os.environ, PYTHONPATH=LOADS_PAY):
            self.process = ServerProcess.start(SMALL | self._options, folder)
        self.url = self.process.url

    def wait_ready(self) -> None:
        asyncio.run(self.process.wait_ready())

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when a machine is lost."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = [line for line in page.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.split()[-1]) for line in found)

    def is_idle(self) -> bool:
        """Whether nothing runs or waits there, no block is used, and no KV is held for others."""
        body = {"prompt": "x", "max_tokens": 1}  # the engine reports with its steps
        httpx.post(self.url + "/v1/completions", json=body, timeout=60).raise_for_status()
        return all(self.metric(name) == 0 for name in BUSY)

    def becomes_idle(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.is_idle():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        self.process.stop()


class PDSite:
    def __init__(
        self,
        folder: Path,
        *,
        prefill: Mapping[str, object] = {},
        decode: Mapping[str, object] = {},
        connector: str = "TCPConnector",
        lease: float = 30.0,
        proxy: tuple[str, ...] = ("--prefill-threshold", "1"),
    ) -> None:
        port = free_ports(4)
        place = f"unix:{folder}/kv" if connector == "SharedMemoryConnector" else "127.0.0.1"
        ends = {"kv_connector": connector, "kv_ip": place, "kv_port": port}
        p = ends | {"kv_role": "kv_producer", "kv_connector_extra_config": {"lease_seconds": lease}}
        extra = {"peers": [place], "lease_seconds": lease}
        d = ends | {"kv_role": "kv_consumer", "kv_connector_extra_config": extra}
        self._proxy: subprocess.Popen[bytes] | None = None
        self.prefill = Side({"kv_transfer_config": p, **prefill}, folder / "p")
        self.decode = Side({"kv_transfer_config": d, **decode}, folder / "d")
        try:
            self._start(folder, proxy)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, proxy: Sequence[str]) -> None:
        for side in (self.prefill, self.decode):
            side.wait_ready()
        self.port = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        words = ["--prefill", self.prefill.url, "--decode", self.decode.url, *proxy]
        with (folder / "proxy.log").open("wb") as log:
            self._proxy = subprocess.Popen(
                [sys.executable, "-m", "quire", "pd-proxy", "--port", str(self.port), *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.wait_for("ok")

    def wait_for(self, status: str, seconds: float = 60.0) -> None:
        """Until the proxy finds the instances like this."""
        until = time.monotonic() + seconds
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health", timeout=10).json()["status"] == status:
                    return
            assert time.monotonic() < until, f"the proxy does not become {status!r}"
            time.sleep(0.05)

    def ways(self) -> dict[str, float]:
        """How many prompts were computed by which side."""
        page = httpx.get(self.url + "/metrics", timeout=30).text
        found = {"prefill": 0.0, "decode": 0.0}
        for line in page.splitlines():
            if line.startswith("quire:pd_requests_total{"):
                found[line.partition('way="')[2].partition('"')[0]] += float(line.split()[-1])
        return found

    def close(self) -> None:
        """SIGTERM to all; each has to end by itself."""
        try:
            if self._proxy is not None:
                self._proxy.send_signal(signal.SIGTERM)
                assert self._proxy.wait(60) == 0
        finally:
            if self._proxy is not None and self._proxy.poll() is None:
                os.killpg(self._proxy.pid, signal.SIGKILL)
                self._proxy.wait()
            try:
                self.prefill.stop()
            finally:
                self.decode.stop()

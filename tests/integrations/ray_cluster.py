"""A Ray cluster of two nodes on this machine, in processes of its own, without a trace afterwards.

`python -m tests.integrations.ray_cluster CPUS` is the process that has it: it writes the address, and ends
the cluster when its stdin is closed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class RayCluster:
    address: str
    environ: dict[str, str]

    def processes(self) -> list[tuple[int, str]]:
        """Ids and commands of the processes that were started within this cluster."""
        return _processes(self.environ["RAY_TMPDIR"])


def _processes(marker: str) -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"RAY_TMPDIR={marker}".encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command:  # else a zombie
                        found.append((int(entry.name), command))
    return found


@contextlib.contextmanager
def two_nodes(cpus_per_node: int = 2) -> Iterator[RayCluster]:
    """Sockets are in the directory, so its name must be short. It has its own session, as engine cores have:
    Linux divides the processor among sessions, and Ray would get only its share of the caller's."""
    directory = tempfile.mkdtemp(prefix="quire-ray-", dir="/tmp")
    Path(directory, "ray").mkdir()
    environ = os.environ | {
        "RAY_TMPDIR": directory,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_gcs_server_request_timeout_seconds": "120",
        "RAY_memory_monitor_refresh_ms": "0",  # else Ray kills workers if others fill this machine
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    environ.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.integrations.ray_cluster", str(cpus_per_node)]
    log = Path(directory, "cluster.log")
    with log.open("wb") as output:
        owner = subprocess.Popen(
            command, cwd=ROOT, env=environ, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
        )  # fmt: skip
    try:
        assert owner.stdin is not None and owner.stdout is not None
        address = owner.stdout.readline().strip()
        assert address, log.read_text()[-3000:]
        yield RayCluster(address, environ | {"RAY_ADDRESS": address})
        owner.stdin.close()
        owner.wait(30)
        deadline = time.monotonic() + 15
        while (left := _processes(directory)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
        for pid, _ in _processes(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": int(sys.argv[1]), "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()

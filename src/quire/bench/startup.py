"""Measures the start in new processes: only the page cache is warm.

Each stage is a command of its own. Figures are medians of several runs. The stages take turns, so that
load from other programs affects all of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import quire
from quire.errors import EngineError

READY_SECONDS = 600.0
POLL_SECONDS = 0.005
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
"""With this variable, a checkout's modules are compiled anew in every process: 0.2 s of a server's start.
Those of an installed package are compiled."""

_ENGINE = """
import json, sys, time
start = time.perf_counter()
from quire import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(**json.loads(sys.argv[1]))
loaded = time.perf_counter()
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
print(json.dumps({"engine_import": imported - start, "engine_load": loaded - imported,
                  "engine_first_token": time.perf_counter() - loaded}))
"""


def measure_startup(
    engine: Mapping[str, object], *, runs: int, cold_kernels: bool = False
) -> dict[str, list[float]]:
    """Seconds of each stage, one per run, in the order of a start.

    engine: flat engine options. cold_kernels: compile the C kernels in each run, as on a new machine.
    Raises `EngineError` with the output of the process that fails.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="quire-startup-") as folder:
            environment = _environment(folder if cold_kernels else None)
            stages = _commands(environment)
            stages |= _engine(engine, environment)
            if cold_kernels:  # the run before has filled the cache
                environment = _environment(str(Path(folder) / "server"))
            stages |= _server(engine, environment, Path(folder))
        for name, value in stages.items():
            seconds.setdefault(name, []).append(value)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def _commands(environment: dict[str, str]) -> dict[str, float]:
    python = sys.executable
    commands = {
        "python": [python, "-c", "pass"],
        "import_quire": [python, "-c", "import quire"],
        "help": [python, "-m", "quire", "--help"],
        "import_torch": [python, "-c", "import torch"],
    }
    return {name: _seconds(command, environment)[0] for name, command in commands.items()}


def _engine(engine: Mapping[str, object], environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-c", _ENGINE, json.dumps(engine)]
    total, output = _seconds(command, environment)
    stages: dict[str, float] = json.loads(output.splitlines()[-1])
    return stages | {"engine_process": total}


def _server(
    engine: Mapping[str, object], environment: dict[str, str], folder: Path
) -> dict[str, float]:
    """From launch to /ready, to the first token, and from SIGTERM to the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = folder / "config.yaml"
    config.write_text(json.dumps({**engine, "host": "127.0.0.1", "port": port}), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "quire", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        while not _answers(f"{url}/ready"):
            if process.poll() is not None or time.perf_counter() - start > READY_SECONDS:
                text = (folder / "server.log").read_text(encoding="utf-8", errors="replace")
                raise EngineError(f"the server did not get ready:\n{text[-2000:]}")
            time.sleep(POLL_SECONDS)
        ready = time.perf_counter()
        _first_token(url)
        answered = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        ended = time.perf_counter()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {
        "server_ready": ready - start,
        "server_first_token": answered - start,
        "server_shutdown": ended - answered,
    }


def _first_token(url: str) -> None:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as answer:
            answer.read()
    except urllib.error.URLError as error:
        raise EngineError(f"the server gave no first token: {error}.") from None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _seconds(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise EngineError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def _environment(kernel_cache: str | None) -> dict[str, str]:
    """The environment of a process that runs this package, installed or not, with its modules compiled; with
    another kernel cache if asked."""
    roots = [str(Path(quire.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(root for root in roots if root)}
    environment.pop(NO_BYTECODE, None)
    return environment | ({"QUIRE_CACHE_DIR": kernel_cache} if kernel_cache else {})

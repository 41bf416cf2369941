"""How each engine's HTTP server is started for W5 and W6, and when it counts as ready."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import cpu
from bench.peers.workloads import ModelShape


@dataclass(frozen=True, slots=True)
class Server:
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    model: str = "model"
    """The name that requests must use."""
    session_field: str | None = None
    """The field of a request that keeps a session in one place, if the server has one."""


ServerMaker = Callable[[int], Server]
"""A port -> how the server that listens there is started."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int, process: subprocess.Popen[bytes], *, timeout: float) -> float:
    """Seconds until /health answers 200. Raises RuntimeError if the process ends or time runs out."""
    started = time.perf_counter()
    while time.perf_counter() - started < timeout:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it was ready.")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.perf_counter() - started
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    raise RuntimeError(f"the server was not ready within {timeout:.0f} s.")


def llama_server(
    root: Path,
    model: ModelShape,
    port: int,
    *,
    slots: int,
    slot_tokens: int,
    threads: int,
    file_type: str | None = None,
) -> list[str]:
    """llama-server on `root`/models/<name>-<type>.gguf with `slots` slots of `slot_tokens`, on the CPU."""
    file = f"{model.name}-{file_type or cpu.gguf_dtype()}.gguf"
    return [
        str(root / "llama.cpp-build" / "bin" / "llama-server"),
        *("--model", str(root / "models" / file)),
        *("--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots)),
        *("--ctx-size", str(slots * slot_tokens)),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--flash-attn", "on", "--batch-size", "2048", "--ubatch-size", "512"),
        # One stream of KV per slot: unified, every token would attend to (and mask) every slot's cells.
        *("--no-kv-unified", "--cache-ram", "0", "--fit", "off"),
        *("--no-ui", "--log-verbosity", "1"),
    ]


def quire_server(root: Path, model: ModelShape, port: int, threads: int) -> Server:
    path = str(root / "models" / model.name)
    return Server(
        [
            *(sys.executable, "-m", "quire", "serve", path),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
            *("--cpu-threads", str(threads), "--max-num-seqs", "64"),
            *("--max-model-len", str(model.max_model_len)),
            *("--kv-cache-memory-bytes", str(model.kv_cache_bytes)),
        ],
        {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )


def vllm_server(root: Path, model: ModelShape, port: int, env: dict[str, str]) -> Server:
    dtype = cpu.compute_dtype()
    return Server(
        [
            str(root / "venvs" / "vllm" / "bin" / "vllm"),
            *("serve", str(root / "models" / model.name), "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype),
            *("--max-num-seqs", "64", "--max-model-len", str(model.max_model_len)),
            *(
                "--kv-cache-memory-bytes",
                str(cpu.kv_cache_bytes(model, dtype)),
                "--disable-log-stats",
            ),
            *("--max-num-batched-tokens", "4096", "--uvicorn-log-level", "warning"),
        ],
        env,
    )


def start(server: Server, log: Path) -> subprocess.Popen[bytes]:
    """The server in a session of its own, so that its helpers end with it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            server.command,
            env={**os.environ, **server.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

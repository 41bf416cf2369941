"""Runner of llama.cpp: llama-server, its own best batching engine, on the GGUF file.

Two servers share the mapped weights: one slot for W2 and W4, and, from its first use on, one of 64 slots for
W1 and W3, as cpu.md has it. For the lone request its own timings are taken (`timings` in its last event), so
HTTP costs it nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.peers import client, runner
from bench.peers.servers import free_port, llama_server, wait_ready
from bench.peers.workloads import Request, Timing


class LlamaCpp:
    def __init__(self, args: runner.RunnerArgs) -> None:
        self.args = args
        self.settings: dict[str, object] = {}
        self.servers: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        self.version = _version(args.models.parent)
        # Both commands are known before the second server starts: the record is made now.
        for slots, workloads in ((1, "W2, W4"), (64, "W1, W3")):
            words = self._command(0, slots)
            self.settings[workloads] = " ".join([Path(words[0]).name, *words[1:]])
        self._port(1)

    def _command(self, port: int, slots: int) -> list[str]:
        root, threads = self.args.models.parent, self.args.threads
        return llama_server(root, self.args.model, port, slots=slots, threads=threads)

    def _port(self, slots: int) -> int:
        """Where the server with that many slots listens, started if need be."""
        if slots not in self.servers:
            port = free_port()
            process = subprocess.Popen(self._command(port, slots), stdout=2)
            self.servers[slots] = (port, process)
            wait_ready(port, process, timeout=300)
        return self.servers[slots][0]

    def generate(self, requests: Sequence[Request]) -> Timing:
        if len(requests) == 1:
            return self._lone(requests[0])
        port = self._port(64)

        async def run() -> list[client.Reply]:
            return await asyncio.gather(
                *(client.stream(port, "/completion", _body(request)) for request in requests)
            )

        started = time.perf_counter()
        replies = asyncio.run(run())
        seconds = time.perf_counter() - started
        return Timing(seconds, None, [_predicted(reply) for reply in replies])

    def _lone(self, request: Request) -> Timing:
        reply = asyncio.run(client.stream(self._port(1), "/completion", _body(request)))
        times = _timings(reply)
        first = float(str(times["prompt_ms"])) / 1e3
        rest = float(str(times["predicted_ms"])) / 1e3
        return Timing(first + rest, first, [_predicted(reply)])

    def peak_rss_mib(self) -> float:
        """Of the larger server alone: the weights are one mapping, which both would count."""
        return max(runner.peak_rss_mib(process.pid) for _, process in self.servers.values())

    def close(self) -> None:
        for _, process in self.servers.values():
            os.kill(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def _body(request: Request) -> dict[str, object]:
    return {
        "prompt": request.prompt,
        "n_predict": request.max_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "cache_prompt": True,
        "stream": True,
    }


def _timings(reply: client.Reply) -> dict[str, object]:
    timings = reply.events[-1].get("timings")
    if not isinstance(timings, dict):
        raise RuntimeError(f"llama-server sent no timings in its last event: {reply.events[-1]}.")
    return timings


def _predicted(reply: client.Reply) -> int:
    return int(str(_timings(reply)["predicted_n"]))


def _version(root: Path) -> str:
    source = next((root / "src").glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    return f"of {source.parent.parent.name}" if source else "unknown"


if __name__ == "__main__":
    runner.main(LlamaCpp)

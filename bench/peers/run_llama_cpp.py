"""Runner of llama.cpp: llama-server, its own best batching engine, on the GGUF file.

One server with one slot for W2 and W4, and beside it (the weights are mapped once) one with a slot for every
request of W1 or of W3, started when it is first needed. For the lone request its own timings are taken
(`timings` in its last event), so HTTP costs it nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers import client, runner
from bench.peers.servers import free_port, llama_server, wait_ready
from bench.peers.workloads import Request, Timing


@dataclass(frozen=True, slots=True)
class Slots:
    """A server's shape. Each slot has room for the longest request of its workload."""

    count: int
    tokens: int


LONE = Slots(1, 2304)
W1 = Slots(64, 512)
W3 = Slots(32, 576)


class LlamaCpp:
    def __init__(self, args: runner.RunnerArgs) -> None:
        self.args = args
        self.servers: dict[Slots, tuple[int, subprocess.Popen[bytes]]] = {}
        self.peak = 0.0
        self.version = _version(args.models.parent)
        # Written down now: the other servers start later.
        self.settings: dict[str, object] = {}
        for slots, workloads in ((LONE, "W2, W4"), (W1, "W1"), (W3, "W3")):
            words = self._command(0, slots)
            self.settings[workloads] = " ".join([Path(words[0]).name, *words[1:]])
        self._port(LONE)

    def _command(self, port: int, slots: Slots) -> list[str]:
        return llama_server(
            self.args.models.parent,
            self.args.model,
            port,
            slots=slots.count,
            slot_tokens=slots.tokens,
            threads=self.args.threads,
            file_type=self.args.option("file"),
        )

    def _port(self, slots: Slots) -> int:
        """Where that server listens, started if need be; of the two with many slots only one lives."""
        if slots not in self.servers:
            for other in [other for other in self.servers if other != LONE]:
                self._end(other)
            port = free_port()
            process = subprocess.Popen(self._command(port, slots), stdout=2)
            self.servers[slots] = (port, process)
            wait_ready(port, process, timeout=300)
        return self.servers[slots][0]

    def generate(self, requests: Sequence[Request]) -> Timing:
        if len(requests) == 1:
            return self._lone(requests[0])
        longest = max(len(request.prompt) + request.max_tokens for request in requests)
        port = self._port(W1 if longest <= W1.tokens else W3)

        async def run() -> list[client.Reply]:
            return await asyncio.gather(
                *(client.stream(port, "/completion", _body(request)) for request in requests)
            )

        started = time.perf_counter()
        replies = asyncio.run(run())
        seconds = time.perf_counter() - started
        return Timing(seconds, None, [_predicted(reply) for reply in replies])

    def _lone(self, request: Request) -> Timing:
        reply = asyncio.run(client.stream(self._port(LONE), "/completion", _body(request)))
        times = _timings(reply)
        first = float(str(times["prompt_ms"])) / 1e3
        rest = float(str(times["predicted_ms"])) / 1e3
        return Timing(first + rest, first, [_predicted(reply)])

    def peak_rss_mib(self) -> float:
        """Of the largest server alone: the weights are one mapping, which each would count."""
        alive = [runner.peak_rss_mib(process.pid) for _, process in self.servers.values()]
        return max(self.peak, *alive)

    def close(self) -> None:
        for slots in list(self.servers):
            self._end(slots)

    def _end(self, slots: Slots) -> None:
        _, process = self.servers.pop(slots)
        self.peak = max(self.peak, runner.peak_rss_mib(process.pid))
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

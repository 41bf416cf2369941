"""What every runner shares: one engine, loaded once, told over stdin what to run, answering JSON lines.

The driver (`compare`) starts one such process per engine, in the engine's own environment, and stops it
(SIGSTOP) whenever another is being measured. Commands, one JSON object a line:

    {"command": "run", "workload": "W1", "repeat": 0}   -> {"measures": {...}}
    {"command": "nudge"}    a small request, to wake threads and caches after a stop
    {"command": "memory"}   -> {"peak_rss_mib": ...}
    {"command": "quit"}

A command that fails is answered {"error": "..."}, and the process goes on. Only the standard library here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from bench.peers.workloads import FULL, MODELS, SMOKE, ModelShape, Request, Timing, build, measures


class Rival(Protocol):
    """An engine with its model loaded."""

    version: str
    settings: dict[str, object]
    """What it was given beyond its defaults, for the record."""

    def generate(self, requests: Sequence[Request]) -> Timing:
        """Run the requests all at once, greedy, EOS ignored, and time it from inside the process."""
        ...

    def peak_rss_mib(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunnerArgs:
    model: ModelShape
    models: Path
    """The folder with every form of the models: M2/, M2-openvino/, M2-bf16.gguf, ..."""
    threads: int
    options: frozenset[str]
    """Variants of one engine, such as `cache-off` and `file=q4_0`."""

    def option(self, name: str) -> str | None:
        """The value of `name=value`."""
        values = [
            option.partition("=")[2] for option in self.options if option.startswith(f"{name}=")
        ]
        return values[0] if values else None


def peak_rss_mib(pid: int | str = "self") -> float:
    """VmHWM of a process: the most memory it ever held, mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM; peak memory needs Linux.")


def main(load: Callable[[RunnerArgs], Rival]) -> None:
    """Load the engine, answer one short request, say so, and obey commands until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--option", action="append", default=[])
    parsed = parser.parse_args()
    args = RunnerArgs(MODELS[parsed.model], parsed.models, parsed.threads, frozenset(parsed.option))
    # Libraries print to stdout whenever they like; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        rival = load(args)
        loaded = time.perf_counter() - started
        rival.generate([_nudge(args.model)])
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"error": f"{type(error).__name__}: {error}"[:500]})
        raise SystemExit(1) from error
    _answer(
        answers,
        {"ready": True, "load_s": loaded, "version": rival.version, "settings": rival.settings},
    )
    scale = SMOKE if parsed.smoke else FULL
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if command["command"] == "quit":
                break
            _answer(answers, _obey(rival, command, args.model, smoke=scale is SMOKE))
    finally:
        rival.close()


def _obey(
    rival: Rival, command: dict[str, object], model: ModelShape, *, smoke: bool
) -> dict[str, object]:
    try:
        if command["command"] == "nudge":
            rival.generate([_nudge(model)])
            return {}
        if command["command"] == "memory":
            return {"peak_rss_mib": rival.peak_rss_mib()}
        if command["command"] == "run":
            name, repeat = str(command["workload"]), int(str(command["repeat"]))
            requests = build(name, model.vocab_size, repeat, SMOKE if smoke else FULL)
            return {"measures": measures(name, requests, rival.generate(requests))}
        raise ValueError(f"no such command: {command}.")
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _nudge(model: ModelShape) -> Request:
    """A prompt of tokens that no workload begins with: the ids from the end of the vocabulary down."""
    return Request([model.vocab_size - 1 - i for i in range(16)], 4)


def _answer(answers: IO[str], message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()

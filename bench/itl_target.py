"""Gaps between the tokens of running answers while a long prompt is computed, with and without --itl-target,
and what the target costs: the prompt's own time, and the throughput of both.

    python -m bench.itl_target --model DIR [--targets 0 100 200] [--rounds N] [--prompt N] [--json FILE]

The engine core in this process, without a front end: a gap is the time of a step in which answers have a row.
`STREAMS` answers run, and `SHORT` requests of 50 tokens come one after the other beside the long prompt.
Targets are measured by turns, each in an engine of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np

from quire.bench.record import run_record
from quire.config import from_flat
from quire.decoding import Decoding
from quire.engine.assemble import build_core
from quire.engine.core import EngineCore
from quire.engine.setup import locate, resolve
from quire.messages import AddRequest, StepOutputs

STREAMS, SHORT = 4, 5
LONG_ID, SHORT_ID = 100, 200


class Run:
    """Remembers the time of each step, and when each request's first token came."""

    def __init__(self, core: EngineCore, seed: int, vocab_size: int) -> None:
        self.core, self.vocab_size = core, vocab_size
        self.rng = np.random.default_rng(seed)
        self.seconds: list[float] = []
        self.first: dict[int, tuple[int, float]] = {}
        self.tokens = 0

    def add(self, request_id: int, size: int, max_tokens: int) -> None:
        ids = self.rng.integers(10, self.vocab_size - 10, size).tolist()
        decoding = Decoding(max_tokens=max_tokens)
        message = AddRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            decoding=decoding,
            arrival_time=float(request_id),
        )
        assert self.core.handle(message) is None

    def step(self) -> None:
        began = perf_counter()
        outputs = self.core.step()
        now = perf_counter()
        assert isinstance(outputs, StepOutputs)
        self.seconds.append(now - began)
        for update in outputs.updates:
            self.tokens += len(update.new_token_ids)
            self.first.setdefault(update.request_id, (len(self.seconds), now))

    def steps_to_first(self, request_id: int, size: int) -> tuple[int, float]:
        """Steps and milliseconds to its first token."""
        self.add(request_id, size, 2)
        number, began = len(self.seconds), perf_counter()
        while request_id not in self.first:
            self.step()
        steps, at = self.first[request_id]
        return steps - number, 1000 * (at - began)


def measure(model: str, target: float, length: int, seed: int, context: int) -> dict:
    options: dict[str, object] = {"model": model, "max_model_len": context, "max_num_seqs": 16}
    if target:
        options["itl_target"] = target
    config = locate(from_flat(options))
    resolved = resolve(config)
    core, _ = build_core(config, resolved)
    run = Run(core, seed, resolved.spec.vocab_size)
    try:
        for index in range(STREAMS):
            run.add(index, 64, context - 100)
        for _ in range(50):
            run.step()
        run.steps_to_first(SHORT_ID, 200)  # something is known of prompts
        alone = run.steps_to_first(SHORT_ID + 1, 50)
        run.seconds.clear()
        run.first.clear()
        run.tokens, began = 0, perf_counter()
        run.add(LONG_ID, length, 2)
        run.step()
        beside = [run.steps_to_first(SHORT_ID + 2 + index, 50) for index in range(SHORT)]
        while LONG_ID not in run.first:
            run.step()
        seconds = perf_counter() - began
    finally:
        core.close()
    gaps = 1000 * np.array(run.seconds)
    p99 = float(np.percentile(gaps, 99))
    return {
        "target_ms": target,
        "steps": len(gaps),
        "gap_ms": {
            "p50": round(float(np.percentile(gaps, 50)), 2),
            "p99": round(p99, 2),
            "max": round(float(gaps.max()), 2),
        },
        "p99_by_target": round(p99 / target, 3) if target else None,
        "long_prompt_seconds": round(seconds, 2),
        "short_steps": max(steps for steps, _ in beside),
        "short_ttft_ms": round(max(milliseconds for _, milliseconds in beside), 1),
        "short_alone_steps": alone[0],
        "short_alone_ttft_ms": round(alone[1], 1),
        "tokens_per_second": round((length + 50 * SHORT + run.tokens) / seconds, 1),
        "prompt_tokens_per_second": round((length + 50 * SHORT) / seconds, 1),
    }


def summary(runs: list[dict]) -> list[dict]:
    """The median of each figure, by target."""
    rows = []
    for target in dict.fromkeys(run["target_ms"] for run in runs):
        mine = [run for run in runs if run["target_ms"] == target]
        row: dict[str, object] = {"target_ms": target, "rounds": len(mine)}
        for name, value in mine[0].items():
            if isinstance(value, float | int) and name != "target_ms":
                row[name] = statistics.median(run[name] for run in mine)
        for name in ("p50", "p99", "max"):
            row[f"gap_{name}_ms"] = statistics.median(run["gap_ms"][name] for run in mine)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.0, 100.0, 200.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    for number in range(options.rounds):
        for target in options.targets:
            run = measure(options.model, target, options.prompt, number, options.context)
            print(json.dumps(run), flush=True)
            runs.append(run)
    rows = summary(runs)
    for row in rows:
        print(json.dumps(row))
    if options.json is not None:
        record = {"record": run_record()} | {"streams": STREAMS, "prompt": options.prompt}
        options.json.write_text(json.dumps(record | {"medians": rows, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()

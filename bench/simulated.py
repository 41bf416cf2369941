"""Whole runs, measured and simulated: how far `quire simulate` is off with a file of `quire bench fit`.

    quire bench fit --model DIR --max-num-seqs 64 --max-model-len 4096 --kv-cache-memory-bytes 1G -o COST
    python -m bench.simulated --model DIR --cost COST [--loads 0 0.3 0.6 0.85] [--seconds 45] [--json FILE]

Requests of ShareGPT's lengths come at Poisson times, at shares of the rate at which the engine is saturated;
load 0 is all of them at once, which measures that rate, and comes first. Nothing of them was fitted. The same
requests at the same times go through the simulator. The engine core runs in this process, as in `LLM`: its
times have no HTTP in them. FILE keeps the loads that are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from quire.bench.datasets import sharegpt
from quire.bench.record import command_line, run_record
from quire.config import from_flat
from quire.decoding import Decoding
from quire.engine.assemble import build_core
from quire.engine.core import EngineCore
from quire.engine.setup import locate, resolve
from quire.messages import AddRequest, StepOutputs
from quire.plan.fitted import FittedCost
from quire.plan.fleet import Fleet
from quire.plan.options import FleetOptions
from quire.plan.simulate import find_device
from quire.plan.traces import TraceRequest

LIMITS = {
    "requests_per_second": 0.05,
    "output_tokens_per_second": 0.05,
    "itl_ms.mean": 0.08,
    "e2e_ms.p50": 0.10,
    "e2e_ms.p99": 0.15,
    "ttft_ms.mean": 0.20,
}
"""Of the error, relative; of the rate at saturation 0.1."""
SATURATION = 0.10
WARM = 16


@dataclass(slots=True)
class Times:
    """Seconds since a run began."""

    arrivals: list[float]
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0

    def token(self, number: int, now: float, count: int) -> None:
        self.tokens += count
        if number in self.last:
            self.gaps.append(now - self.last[number])
        self.first.setdefault(number, now)
        self.last[number] = now

    def figures(self) -> dict[str, float]:
        numbers = sorted(self.last)
        ttft = 1e3 * np.array([self.first[n] - self.arrivals[n] for n in numbers])
        e2e = 1e3 * np.array([self.last[n] - self.arrivals[n] for n in numbers])
        seconds, gaps = max(self.last.values()), 1e3 * np.array(self.gaps)
        return {
            "requests_per_second": len(numbers) / seconds,
            "output_tokens_per_second": self.tokens / seconds,
            "itl_ms.mean": float(gaps.mean()),
            "itl_ms.p50": float(np.percentile(gaps, 50)),
            "itl_ms.p99": float(np.percentile(gaps, 99)),
            "e2e_ms.p50": float(np.percentile(e2e, 50)),
            "e2e_ms.p99": float(np.percentile(e2e, 99)),
            "ttft_ms.mean": float(ttft.mean()),
            "ttft_ms.p50": float(np.percentile(ttft, 50)),
            "ttft_ms.p99": float(np.percentile(ttft, 99)),
        }


def requests_of(
    count: int, vocab_size: int, longest: int, seed: int
) -> list[tuple[list[int], int]]:
    """Prompts of random tokens and output lengths, as long as ShareGPT's."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        prompt = round(rng.lognormal(np.log(sharegpt.PROMPT_MEDIAN), sharegpt.PROMPT_SIGMA))
        output = round(rng.lognormal(np.log(sharegpt.OUTPUT_MEDIAN), sharegpt.OUTPUT_SIGMA))
        if sharegpt.keeps(prompt, output, fixed_output=False) and prompt + output < longest:
            found.append((rng.integers(10, vocab_size - 10, prompt).tolist(), output))
    return found


def measured(
    core: EngineCore, requests: Sequence[tuple[list[int], int]], arrivals: list[float]
) -> Times:
    """An idle engine waits for the next request; else requests that have come are added between steps."""
    times, sent = Times(arrivals), 0
    core.scheduler.reset_prefix_cache()
    gc.collect()
    began = time.perf_counter()
    while sent < len(requests) or core.has_work:
        now = time.perf_counter() - began
        while sent < len(requests) and arrivals[sent] <= now:
            ids, size = requests[sent]
            message = AddRequest(
                request_id=sent,
                prompt_token_ids=ids,
                decoding=Decoding(max_tokens=size),
                arrival_time=arrivals[sent],
            )
            assert core.handle(message) is None
            sent += 1
        if not core.has_work:
            time.sleep(max(0.0, arrivals[sent] - (time.perf_counter() - began)))
            continue
        outputs = core.step()
        assert isinstance(outputs, StepOutputs)
        now = time.perf_counter() - began
        for update in outputs.updates:
            times.token(update.request_id, now, len(update.new_token_ids))
    return times


def simulated(
    values: dict[str, object],
    cost: str,
    requests: Sequence[tuple[list[int], int]],
    arrivals: list[float],
) -> tuple[dict[str, float], float]:
    """And how many seconds it took."""
    options = FleetOptions(cost=cost)
    device = find_device(values, options, None)
    fleet = Fleet(lambda: device.replica(options, exact_ends=True), 1, delay=device.request_seconds)
    trace = [
        TraceRequest(at, ((number + 1, len(ids)),), size)
        for number, (at, (ids, size)) in enumerate(zip(arrivals, requests, strict=True))
    ]
    began = time.perf_counter()
    run = fleet.run(trace)
    took = time.perf_counter() - began
    times = Times(arrivals)
    for life in run.lives:
        times.first[life.number], times.last[life.number] = life.first, life.last
        times.tokens += life.made
    times.gaps = [0.0]
    figures = times.figures() | {
        "itl_ms.mean": 1e3 * run.gaps.mean,
        "itl_ms.p50": 1e3 * run.gaps.percentile(50),
        "itl_ms.p99": 1e3 * run.gaps.percentile(99),
    }
    return figures, took


def compare(load: float, real: dict[str, float], said: dict[str, float]) -> list[str]:
    limits = {"requests_per_second": SATURATION} if not load else LIMITS
    lines = [f"load {load:g}" if load else "all at once"]
    for name, value in real.items():
        error, limit = said[name] / value - 1, limits.get(name)
        verdict = "" if limit is None else "ok" if abs(error) <= limit else f"MISSED ({limit:.0%})"
        lines.append(f"  {name:<26}{value:>10.2f}{said[name]:>10.2f}{error:>8.1%}  {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cost", required=True)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.85])
    parser.add_argument("--seconds", type=float, default=45.0, help="in which requests come")
    parser.add_argument("--repeats", type=int, default=1, help="medians of so many measured runs")
    parser.add_argument("--burst", type=int, default=192, help="requests at load 0")
    parser.add_argument("--seats", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    values: dict[str, object] = {
        "model": args.model,
        "max_num_seqs": args.seats,
        "max_model_len": args.context,
        "kv_cache_memory_bytes": 1 << 30,
    }
    cost = FittedCost.load(args.cost)
    found = (
        json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else {}
    )
    results = found.get("results", {})
    config = locate(from_flat(values))
    resolved = resolve(config)
    core, _ = build_core(config, resolved)
    gc.freeze()
    vocab_size = resolved.spec.vocab_size
    try:
        measured(core, requests_of(WARM, vocab_size, 200, 99), [0.0] * WARM)
        for load in args.loads:
            seed = 1 + round(100 * load)
            count, arrivals = args.burst, [0.0] * args.burst
            if load:
                rate = load * results["0"]["measured"]["requests_per_second"]
                count = max(8, round(rate * args.seconds))
                gaps = np.random.default_rng(seed).exponential(1 / rate, count)
                arrivals = np.cumsum(gaps).tolist()
            requests = requests_of(count, vocab_size, args.context, seed=seed)
            runs = [measured(core, requests, arrivals).figures() for _ in range(args.repeats)]
            real = {name: median(run[name] for run in runs) for name in runs[0]}
            said, took = simulated(values, args.cost, requests, arrivals)
            print("\n".join(compare(load, real, said)), flush=True)
            results[f"{load:g}"] = {
                "measured": real,
                "simulated": said,
                "errors": {name: said[name] / value - 1 for name, value in real.items()},
                "requests": count,
                "itl_ms.mean_of_runs": [run["itl_ms.mean"] for run in runs],
                "command": command_line(),
                "simulation_seconds": took,
            }
    finally:
        core.close()
    if args.json is not None:
        facts = {"record": run_record(), "limits": LIMITS | {"saturation": SATURATION}}
        fitted = {"errors": dict(cost.errors), "about": dict(cost.about)}
        content = facts | {"cost": fitted, "seats": args.seats, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

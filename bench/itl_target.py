"""Gaps between the tokens of running answers while a long prompt is computed, with and without --itl-target,
and what the target costs: the prompt's own time and the throughput of both.

    python -m bench.itl_target --model DIR [--targets 0 100 200] [--rounds N] [--prompt N] [--json FILE]

Gaps are those of vllm:inter_token_latency_seconds, by the engine core's clock, of `STREAMS` answers. A short
request comes a second after the long prompt. Targets are measured by turns, each in an engine of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np

from quire.bench.record import run_record
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.metrics import NullMetrics
from quire.sampling_params import RequestOutputKind, SamplingParams

STREAMS = 4
STREAM = SamplingParams(
    temperature=0.0, max_tokens=4000, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)
FEW = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


class Gaps(NullMetrics):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_token_gap(self, seconds: float) -> None:
        self.seconds.append(seconds)


async def first_token(engine: AsyncLLM, tokens: list[int]) -> float:
    began = perf_counter()
    async for _ in engine.submit(tokens, FEW.replace(output_kind=RequestOutputKind.DELTA)):
        return perf_counter() - began
    raise RuntimeError("no output")


async def measure(model: str, target: float, length: int, seed: int, context: int) -> dict:
    options: dict[str, object] = {"model": model, "max_model_len": context, "max_num_seqs": 16}
    if target:
        options["itl_target"] = target
    engine = await AsyncLLM.start(from_flat(options))
    rng = np.random.default_rng(seed)

    def prompt(size: int) -> list[int]:
        return rng.integers(10, engine.model.vocab_size - 10, size).tolist()

    async def answer() -> None:
        async for _ in engine.submit(prompt(64), STREAM):
            pass

    try:
        streams = [asyncio.create_task(answer()) for _ in range(STREAMS)]
        await asyncio.sleep(1.0)
        await first_token(engine, prompt(200))  # something is known of prompts
        alone = await first_token(engine, prompt(50))
        gaps = Gaps()
        engine.attach_metrics(gaps)
        began = perf_counter()
        long = asyncio.create_task(first_token(engine, prompt(length)))
        await asyncio.sleep(1.0)
        short = await first_token(engine, prompt(50))
        long_seconds = await long
        seconds = perf_counter() - began
        engine.attach_metrics(NullMetrics())
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    finally:
        await engine.shutdown()
    found = np.array(gaps.seconds) * 1000
    return {
        "target_ms": target,
        "gaps": len(found),
        "gap_ms": {
            "p50": round(float(np.percentile(found, 50)), 2),
            "p99": round(float(np.percentile(found, 99)), 2),
            "max": round(float(found.max()), 2),
        },
        "p99_by_target": round(float(np.percentile(found, 99)) / target, 3) if target else None,
        "long_prompt_seconds": round(long_seconds, 2),
        "short_ttft_ms": round(short * 1000, 1),
        "short_ttft_without_long_ms": round(alone * 1000, 1),
        "tokens_per_second": round((length + 50 + len(found)) / seconds, 1),
    }


def summary(runs: list[dict]) -> list[dict]:
    """The median of each figure, by target."""
    rows = []
    for target in dict.fromkeys(run["target_ms"] for run in runs):
        mine = [run for run in runs if run["target_ms"] == target]
        row: dict[str, object] = {"target_ms": target, "rounds": len(mine)}
        for name in ("long_prompt_seconds", "short_ttft_ms", "tokens_per_second", "p99_by_target"):
            if mine[0][name] is not None:
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
            run = asyncio.run(
                measure(options.model, target, options.prompt, number, options.context)
            )
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

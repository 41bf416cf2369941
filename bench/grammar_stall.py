"""Whether a heavy grammar that compiles delays the steps of other requests: the gaps between tokens of some
streams while such requests come, and while as many plain ones come, in turns. Gaps are those of
vllm:inter_token_latency_seconds, by the engine core's clock.

    python bench/grammar_stall.py [--json FILE] [--seconds S] [--rounds N] [--cpu-threads T]

Each grammar is new (100 alternative schemas), is tried first as the server does, and its request generates
two tokens; so do the plain ones, and what both cost as members of the batch is in both figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from quire.bench.grammar import PERSON
from quire.bench.record import PACKAGES, run_record
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.metrics import NullMetrics
from quire.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

STREAMS = 4
EVERY_SECONDS = 0.5
STREAM = SamplingParams(
    temperature=0.0, max_tokens=1500, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)
PLAIN = SamplingParams(temperature=0.0, max_tokens=2, output_kind=RequestOutputKind.FINAL_ONLY)


def heavy(number: int) -> StructuredOutputsParams:
    """A schema that no cache has seen."""
    fields = (f"field_{number}_{i}" for i in range(100))
    alternatives = [
        {"type": "object", "properties": {name: PERSON}, "required": [name]} for name in fields
    ]
    return StructuredOutputsParams(json={"anyOf": alternatives})


class Gaps(NullMetrics):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_token_gap(self, seconds: float) -> None:
        self.seconds.append(seconds)


class Bench:
    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine
        self.number = 0
        self.waits: list[float] = []
        """Seconds from asking to the answer of each request with a grammar."""

    async def gaps(self, seconds: float, *, grammars: bool) -> list[float]:
        """Seconds between tokens of all streams."""
        found = Gaps()
        self.engine.attach_metrics(found)
        streams = (self._stream(seconds, index) for index in range(STREAMS))
        await asyncio.gather(*streams, self._visit(seconds, grammars))
        return found.seconds

    async def _stream(self, seconds: float, index: int) -> None:
        started = perf_counter()
        while perf_counter() - started < seconds:
            stream = self.engine.submit(f"Stream {index} at {started}", STREAM)
            async for _ in stream:
                if perf_counter() - started >= seconds:
                    stream.abort()
                    break

    async def _visit(self, seconds: float, grammars: bool) -> None:
        started = perf_counter()
        while (asked := perf_counter()) - started < seconds:
            self.number += 1
            params = PLAIN
            if grammars:
                params = PLAIN.replace(structured_outputs=heavy(self.number))
                await asyncio.to_thread(self.engine.check_grammar, params)
            async for output in self.engine.submit(f"Visitor {self.number}", params):
                assert output.outputs[0].finish_reason == "length", output.error
            if grammars:
                self.waits.append(perf_counter() - asked)
            await asyncio.sleep(max(0.0, asked + EVERY_SECONDS - perf_counter()))


def figures(gaps: Sequence[float]) -> dict[str, float]:
    names = {
        "p50_ms": 50,
        "p90_ms": 90,
        "p95_ms": 95,
        "p99_ms": 99,
        "p99.9_ms": 99.9,
        "max_ms": 100,
    }
    return {name: float(np.percentile(gaps, q)) * 1e3 for name, q in names.items()}


async def run(args: argparse.Namespace) -> dict[str, object]:
    engine = await AsyncLLM.start(
        from_flat({"cpu_threads": args.cpu_threads, "disable_log_stats": True})
    )
    try:
        bench = Bench(engine)
        await bench.gaps(2.0, grammars=True)  # the helper process starts, the vocabulary is read
        bench.waits.clear()
        gaps: dict[bool, list[list[float]]] = {False: [], True: []}
        for number in range(args.rounds):
            for grammars in (False, True) if number % 2 == 0 else (True, False):
                gaps[grammars].append(await bench.gaps(args.seconds, grammars=grammars))
    finally:
        await engine.shutdown()
    plain, grammar = (figures([gap for some in gaps[kind] for gap in some]) for kind in gaps)
    ratios = [
        figures(b)["p99_ms"] / figures(a)["p99_ms"]
        for a, b in zip(gaps[False], gaps[True], strict=True)
    ]
    return {
        "plain": plain,
        "grammars": grammar,
        "p99_ratio": grammar["p99_ms"] / plain["p99_ms"],
        "p99_ratio_of_rounds": {"median": statistics.median(ratios), "all": ratios},
        "num_gaps": {"plain": sum(map(len, gaps[False])), "grammars": sum(map(len, gaps[True]))},
        "grammar_request_ms": {
            "median": statistics.median(bench.waits) * 1e3,
            "max": max(bench.waits) * 1e3,
        },
        "settings": {
            "streams": STREAMS, "visitors_every_s": EVERY_SECONDS, "rounds": args.rounds,
            "seconds": args.seconds, "cpu_threads": args.cpu_threads,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn (default: 6)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each kind (default: 6)")
    parser.add_argument("--cpu-threads", type=int, default=None, help="as of quire serve")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result, indent=1))
    if args.json:
        record = run_record(packages=(*PACKAGES, "llguidance"))
        Path(args.json).write_text(json.dumps(result | {"record": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()

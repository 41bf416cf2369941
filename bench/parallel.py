"""Two ranks, or two stages, of one thread each against one device with two threads, on one machine.

    python -m bench.parallel --model DIR [--rows 1 16 64] [--repeats 5] [--lock FILE] [--json FILE]

Engines take turns in each repeat. `decode` is generated tokens per second after the first of each request,
`prefill` prompt tokens per second. `gathers` is the share of a decoding step's forward pass that the sampling
rank spends in gathers, waiting included. `plan` is what a step costs beside the forward pass because there is
another rank: to encode and send the plan, and to receive, decode and apply it there. `start` is the time from
the start of the processes until the engine is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from quire import LLM, SamplingParams
from quire.bench.record import run_record
from quire.messages import PlannedRow, StepPlan
from quire.messages.worker import RunStep, SampledTokens, WorkerInput

PROMPT, NEW, LONG = 64, 33, 1024
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "max_model_len": 2048,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 1 << 30,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"cpu_threads": 2},
    "tp2": {"tensor_parallel_size": 2, "cpu_threads": 1},
    "pp2": {"pipeline_parallel_size": 2, "cpu_threads": 1},
}


@contextlib.contextmanager
def held(lock: str | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def generate(llm: LLM, rows: int, prompt: int, new: int) -> float:
    """Seconds."""
    rng = random.Random(rows)
    prompts = [
        {"prompt_token_ids": [rng.randrange(5, 4000) for _ in range(prompt)]} for _ in range(rows)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def speeds(llm: LLM, row_counts: list[int]) -> dict[str, float]:
    """Tokens per second."""
    found = {}
    for rows in row_counts:
        prompts = generate(llm, rows, PROMPT, 1)
        found[f"decode {rows}"] = rows * (NEW - 1) / (generate(llm, rows, PROMPT, NEW) - prompts)
    found["prefill"] = LONG / generate(llm, 1, LONG, 1)
    return found


def profile(model: str, row_counts: list[int]) -> dict[str, float]:
    """Of the sampling rank: shares of gathers in decoding, and microseconds that a step's plan takes."""
    with LLM(model, **LAYOUTS["tp2"], **OPTIONS) as llm:
        executor: Any = llm._core._core.executor
        os.sched_setaffinity(0, executor._shares[0])  # as the engine's own process does
        decoder = executor._worker.runner.backend._pass
        send, spent = executor._others.run, [0.0]

        def timed(*args: Any) -> None:
            start = time.perf_counter()
            send(*args)
            spent[0] += time.perf_counter() - start

        executor._others.run = timed
        found = {}
        for rows in row_counts:
            generate(llm, rows, PROMPT, 2)
            before, spent[0] = decoder.profile(), 0.0
            generate(llm, rows, PROMPT, NEW)
            prompts = {name: value - before[name] for name, value in decoder.profile().items()}
            before = decoder.profile()
            generate(llm, rows, PROMPT, 1)
            only = {name: value - before[name] for name, value in decoder.profile().items()}
            decoding = {name: prompts[name] - only[name] for name in prompts}
            found[f"gathers {rows}"] = decoding["gather"] / sum(decoding.values())
            found[f"plan sent {rows}"] = spent[0] / NEW * 1e6
            found[f"plan read {rows}"] = seconds_to_read(rows) * 1e6
        latencies = []
        for _ in range(200):
            start = time.perf_counter()
            executor.table_digests({})
            latencies.append(time.perf_counter() - start)
        found["round trip"] = statistics.median(latencies) * 1e6
        return found


def seconds_to_read(rows: int) -> float:
    """To decode the plan of a decoding step."""
    planned = [
        PlannedRow(request_id=i, start=500, num_tokens=1, samples=1, num_drafts=0)
        for i in range(rows)
    ]
    message = RunStep(
        StepPlan(step_id=5, rows=planned), [SampledTokens(4, [[1000] for _ in range(rows)])]
    )
    coded, decode = msgspec.msgpack.encode(message), msgspec.msgpack.Decoder(WorkerInput).decode
    times = []
    for _ in range(200):
        start = time.perf_counter()
        decode(coded)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def idle_share(llm: LLM) -> float:
    """Processor seconds per second of an idle engine's processes."""
    core = psutil.Process(llm._core.process.pid)  # type: ignore[union-attr]
    processes = [core, *core.children()]
    time.sleep(1.0)
    before = sum(sum(each.cpu_times()[:2]) for each in processes)
    time.sleep(3.0)
    return (sum(sum(each.cpu_times()[:2]) for each in processes) - before) / 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--lock")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    starts: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LAYOUTS}
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, options in LAYOUTS.items():
            for last in (False, False, True):
                with held(args.lock):
                    start = time.perf_counter()
                    llm = LLM(args.model, engine="process", **options, **OPTIONS)
                    starts[name].append(time.perf_counter() - start)
                if last:
                    engines[name] = stack.enter_context(llm)
                else:
                    llm.close()
        for repeat in range(args.repeats + 1):
            for name, llm in engines.items():
                with held(args.lock):
                    found = speeds(llm, args.rows)
                if repeat:  # the first warms up
                    runs[name].append(found)
        idle = idle_share(engines["tp2"])
    medians = {
        name: {case: statistics.median(run[case] for run in each) for case in each[0]}
        for name, each in runs.items()
    }
    ratios = {
        f"{name}_over_tp1": {case: each[case] / medians["tp1"][case] for case in each}
        for name, each in medians.items()
        if name != "tp1"
    }
    with held(args.lock):
        parts = profile(args.model, args.rows)
    result = {
        "tokens_per_second": medians,
        **ratios,
        "start_seconds": {name: statistics.median(each) for name, each in starts.items()},
        "idle_processor_share": idle,
        "parts": parts,
        "runs": runs,
    }
    print(json.dumps({key: result[key] for key in result if key != "runs"}, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps({"run": run_record(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()

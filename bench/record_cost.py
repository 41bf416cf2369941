"""What the record of decisions costs: a scheduler with it and one without, step by step in turns.

    python bench/record_cost.py [--json FILE] [--engine]

Without a model: an executor that returns at once. *steady*: the same requests generate, step after step.
*churn*: requests of 128 tokens in and 64 out follow each other, so that some begin and end all the time. A
figure is the median over slices of 64 steps, in microseconds per step; the difference is the median of the
slices' differences. With --engine also the built-in model's steps, with `LLM`, to compare with.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

from quire.bench.record import run_record
from quire.decoding import Decoding
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, SampledRow, StepResult
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.record import Recorder

ROWS = (1, 16, 64, 256)
SLICE, SLICES = 64, 40


class Load:
    """Keeps `rows` requests running."""

    def __init__(self, rows: int, *, record: bool, churn: bool) -> None:
        self.rows, self.churn, self.next_id = rows, churn, 0
        self.recorder = Recorder() if record else None
        length = 256 if churn else 1 << 20
        blocks = 1 + rows * (200 if not churn else 16) + length // 16
        self.scheduler = Scheduler(
            SchedulerLimits(256, 2048, length),
            KVCacheManager(blocks, 16, enable_prefix_caching=True),
            record=self.recorder,
        )
        self.fill()
        self.run(32)

    def fill(self) -> None:
        while len(self.scheduler.requests) < self.rows:
            self.next_id += 1
            prompt, tokens = (128, 64) if self.churn else (16, 1 << 19)
            if self.churn and self.next_id <= self.rows:  # so that they do not end together
                tokens = 1 + self.next_id * 63 // self.rows
            self.scheduler.add_request(
                AddRequest(
                    request_id=self.next_id,
                    prompt_token_ids=[self.next_id] * prompt,
                    decoding=Decoding(max_tokens=tokens),
                )
            )

    def run(self, steps: int) -> float:
        """Microseconds per step."""
        scheduler, spent = self.scheduler, 0.0
        for _ in range(steps):
            begun = time.perf_counter()
            plan = scheduler.schedule()
            spent += time.perf_counter() - begun
            sampled = [
                SampledRow(request_id=row.request_id, token_ids=[7])
                for row in plan.rows
                if row.samples
            ]
            result = StepResult(step_id=plan.step_id, sampled=sampled)
            begun = time.perf_counter()
            scheduler.update(plan, result)
            scheduler.take_stats()
            if self.churn:
                self.fill()
            spent += time.perf_counter() - begun
        return spent / steps * 1e6


def measure(rows: int, *, churn: bool) -> dict[str, float]:
    without, with_it = (Load(rows, record=record, churn=churn) for record in (False, True))
    slices = SLICES if rows < 256 or not churn else SLICES // 2
    pairs = []
    gc.disable()
    for number in range(slices):
        if number % 2:
            more = with_it.run(SLICE)
            pairs.append((without.run(SLICE), more))
        else:
            less = without.run(SLICE)
            pairs.append((less, with_it.run(SLICE)))
        gc.collect()
    gc.enable()
    assert with_it.recorder is not None
    begun = time.perf_counter()
    size = len(with_it.recorder.dump())
    return {
        "without": statistics.median(a for a, _ in pairs),
        "cost": statistics.median(b - a for a, b in pairs),
        "bytes per step": size / (SLICE * slices),
        "dump ms": (time.perf_counter() - begun) * 1e3,
    }


def engine_steps() -> dict[str, float]:
    """Microseconds of a step of the built-in model."""
    from quire import LLM, SamplingParams

    params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
    found = {}
    with LLM(max_num_seqs=256, max_num_batched_tokens=2048) as llm:
        for rows in ROWS:
            prompts = [f"{number} is" for number in range(rows)]
            llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
            begun = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            found[str(rows)] = (time.perf_counter() - begun) / 200 * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", action="store_true")
    args = parser.parse_args()
    steps = engine_steps() if args.engine else {}
    results = {}
    print(f"{'':14}{'scheduler':>10}{'record':>8}{'':>7}{'bytes':>7}{'dump ms':>9}{'step':>9}")
    for churn in (False, True):
        for rows in ROWS:
            name = f"{'churn' if churn else 'steady'} {rows}"
            each = results[name] = measure(rows, churn=churn)
            share = each["cost"] / each["without"]
            line = f"{name:14}{each['without']:10.1f}{each['cost']:8.2f}{share:7.1%}"
            line += f"{each['bytes per step']:7.1f}{each['dump ms']:9.2f}"
            if str(rows) in steps:
                step = steps[str(rows)]
                each["engine step"] = step
                line += f"{step:9.0f} {each['cost'] / step:.2%}"
            print(line, flush=True)
    if args.json:
        record = run_record() | {"us": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

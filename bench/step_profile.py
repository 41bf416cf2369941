"""Where a step's time goes: a bar per workload, from the scheduler down to the phases of the forward pass.

    python bench/step_profile.py [--models DIR] [--json FILE] [--picture FILE]

The engine's parts are timed by wrapping them (about 0.3 us a call), the phases of the forward pass by
its own clock (`NativeProgram.profile`). M1 and M2 are checkpoints of bench/peers, in DIR; without it only the
built-in model is measured. A figure is the fastest of five runs' mean over its steps, in microseconds: what
the machine does beside us can only add.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire import LLM, SamplingParams
from quire.bench.record import run_record
from quire.runner.runner import RunningStep

RUNS = 5


@dataclass(frozen=True, slots=True)
class Case:
    label: str
    model: str | None
    requests: int
    prompt: int
    steps: int
    """Tokens sampled by each request; 1 measures the prompt's own step."""


CASES = (
    Case("built-in 4M, 1 request", None, 1, 32, 256),
    Case("built-in 4M, 64 requests", None, 64, 32, 256),
    Case("M2 110M, 1 request", "M2", 1, 128, 128),
    Case("M2 110M, 64 requests", "M2", 64, 128, 64),
    Case("M1 0.6B, 1 request", "M1", 1, 128, 64),
    Case("M2 110M, prompt of 2048", "M2", 1, 2048, 1),
)

# Drawn from the bottom: what waits for memory or multiplies, what attends, the rest, and Python.
GROUPS = {
    "products": ("qkv", "o", "gate_up", "down", "head"),
    "attention": ("attention",),
    "norm, rope, SiLU, embed": ("norm", "rope_write", "gated", "embed"),
    "scheduler": ("schedule", "update"),
    "batch and call": ("build batch", "call"),
    "sampling": ("sample",),
    "text out": ("outputs",),
    "loop": ("loop",),
}


class Stopwatch:
    """Seconds by part, of wrapped methods; what a part spends in another is the other's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def wrap(self, owner: Any, method: str, part: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                own = elapsed - self._inner.pop()
                self._inner[-1] += elapsed
                self.seconds[part] = self.seconds.get(part, 0.0) + own

        setattr(owner, method, timed)


def watch_engine(llm: LLM) -> Stopwatch:
    """Times the parts of an engine's step. "build batch" includes the forward pass."""
    core = llm._core._core  # a benchmark may look inside
    runner = core.executor.runner
    watch = Stopwatch()
    watch.wrap(core.scheduler, "schedule", "schedule")
    watch.wrap(core.scheduler, "update", "update")
    watch.wrap(runner, "launch", "build batch")
    watch.wrap(RunningStep, "result", "build batch")
    watch.wrap(runner.backend._sampler, "sample", "sample")
    watch.wrap(llm._front, "take", "outputs")
    return watch


def measure(case: Case, models: Path | None) -> dict[str, float]:
    """Microseconds a step, by part."""
    model: dict[str, Any] = {}
    if case.model is not None:
        model = {"model": str((models or Path()) / case.model), "max_model_len": 2304}
    llm = LLM(
        **model,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    runner = llm._core._core.executor.runner
    decoder = runner.backend._pass
    watch = watch_engine(llm)
    rng = random.Random(0)
    vocab = runner.model.spec.vocab_size - 300
    params = SamplingParams(temperature=0.0, max_tokens=case.steps, ignore_eos=True)
    runs = []
    for _ in range(RUNS + 1):  # the first warms up
        prompts = [
            {"prompt_token_ids": [rng.randrange(5, vocab) for _ in range(case.prompt)]}
            for _ in range(case.requests)
        ]
        before = decoder.profile()
        watch.seconds.clear()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        total = time.perf_counter() - start
        phases = {name: after - before[name] for name, after in decoder.profile().items()}
        parts = phases | watch.seconds
        # `execute` without sampling holds the pass itself and Python's way to it.
        parts["build batch"] -= sum(phases.values())
        parts["loop"] = total - sum(parts.values())
        runs.append({name: seconds / case.steps * 1e6 for name, seconds in parts.items()})
    llm.close()
    return min(runs[1:], key=lambda run: sum(run.values()))


def draw(profiles: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.62 * len(profiles) + 1.4), layout="constrained")
    colors = [
        "#1b4965",
        "#5fa8d3",
        "#bee9e8",
        "#f4a259",
        "#f7c59f",
        "#bc4b51",
        "#8cb369",
        "#d9d9d9",
    ]
    labels = list(profiles)[::-1]
    left = [0.0] * len(labels)
    for (group, parts), color in zip(GROUPS.items(), colors, strict=True):
        shares = []
        for label in labels:
            profile = profiles[label]
            share = sum(profile.get(part, 0.0) for part in parts) / sum(profile.values())
            shares.append(100 * max(0.0, share))
        axes.barh(labels, shares, left=left, color=color, label=group, height=0.68)
        for y, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 5:
                dark = color in ("#1b4965", "#bc4b51")
                axes.text(
                    start + share / 2, y, f"{share:.0f}", ha="center", va="center",
                    fontsize=8, color="white" if dark else "black",
                )  # fmt: skip
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for y, label in enumerate(labels):
        total = sum(profiles[label].values())
        text = f"{total / 1000:.2f} ms" if total < 1e5 else f"{total / 1e6:.2f} s"
        axes.text(101, y, text, va="center", fontsize=9)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a step, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="where bench/peers made M1 and M2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help=".svg or .png; needs matplotlib")
    options = parser.parse_args()
    cases = [case for case in CASES if case.model is None or options.models is not None]
    profiles = {case.label: measure(case, options.models) for case in cases}
    for label, profile in profiles.items():
        shown = ", ".join(f"{name} {us:.0f}" for name, us in profile.items())
        print(f"{label}: {sum(profile.values()):.0f} us: {shown}")
    if options.json is not None:
        record = {**run_record(), "microseconds_per_step": profiles}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        draw(profiles, options.picture)


if __name__ == "__main__":
    main()

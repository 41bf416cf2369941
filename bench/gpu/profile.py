"""Where a decode step's time goes: kernels of a step, how long the GPU works, what the host adds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from bench.gpu import engines
from bench.gpu.lab import DEVICE, SIZES, spec_of
from bench.gpu.suite import Case, Entry, Options, Values
from torch.profiler import ProfilerActivity, profile

from quire.models.spec import ModelSpec

STEPS = 10


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    sizes = SIZES[options.sizes]
    return [
        Case(
            f"{model} {batch} requests, {'eager' if eager else 'graphs'}",
            partial(steps, spec_of(model, options.sizes), sizes.long, batch, eager=eager),
            90,
        )
        for model in options.models
        for batch in sizes.batches[::2]
        for eager in (False, True)
    ]


def steps(spec: ModelSpec, prompt: int, batch: int, *, eager: bool) -> Values:
    """Ten steps by the clock, then ten under PyTorch's profiler, which slows the host."""
    turns = -(-batch * prompt // 8192)
    output = 2 * STEPS + turns + 12
    limits = engines.Limits(batch, 8192, prompt + output, batch * (prompt + output + 16))
    core = engines.build(spec, limits, eager=eager)
    for message in engines.requests(spec, [(prompt, output)] * batch, seed=1):
        core.handle(message)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            core.step()
        return (time.perf_counter() - began) / count

    run(turns + 6)  # prompts, and what records a graph
    wall_us = 1e6 * run(STEPS)
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        run(STEPS)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type.name.lower() == DEVICE.type
    ]
    found = summarize(kernels, STEPS)
    return {"step_us": wall_us, "gap_share": 1 - found["busy_us"] / wall_us, **found}


def summarize(kernels: Sequence[tuple[str, float, float]], count: int) -> Values:
    """(name, start, end in microseconds) of `count` steps; figures per step. busy_us: at least one ran."""
    busy, until = 0.0, float("-inf")
    spent: defaultdict[str, float] = defaultdict(float)
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        spent[name] += end - start
    top = sorted(spent.items(), key=lambda item: -item[1])[:8]
    return {
        "kernels": len(kernels) / count,
        "busy_us": busy / count,
        "top_us": {name[:60]: total / count for name, total in top},
    }

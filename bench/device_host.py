"""What a decoding step of a GPU costs the host, with a device that computes nothing.

    TRITON_INTERPRET=1 python -m bench.device_host [--rows 1,64,256] [--steps 400]

`EngineCore` with the GPU's runner: scheduling, packing, the copies' calls and the results are real; the graph
of a step is a function that returns the same tokens at once. The driver's part (a graph's launch,
events, page-locked memory) is missing, some 20 us. Prints the median and the 90th percentile of a step in
microseconds, and the runner's share of the median: launch and result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from quire.config import from_flat
from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.kernels.triton.sampling import DeviceTokens
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, StepPlan
from quire.models.decoder import DecoderModel
from quire.models.registry import resolve_spec
from quire.runner.device import HostDevice, Result
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.graphs import Computed, StepShape
from quire.runner.worker import Worker
from quire.scheduler import Scheduler, SchedulerLimits

LENGTH, BLOCK_SIZE = 4096, 64
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1000, "max_position_embeddings": LENGTH,
}  # fmt: skip


class NullDevice(HostDevice):
    """Everything that is recorded has been computed already."""

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        result = work()
        return lambda: result


def null_core(rows: int, **options: Any) -> EngineCore:
    sizes = {"max_num_seqs": rows, "max_num_batched_tokens": 2048, "max_model_len": LENGTH}
    config = from_flat({**sizes, "block_size": BLOCK_SIZE, **options})
    spec = WorkerSpec(
        model=resolve_spec(MODEL), directory=Path(), dtype="float32", kv_cache_dtype="float32",
        device="cpu", max_model_len=LENGTH,
    )  # fmt: skip
    platform = GPU(config, spec, NullDevice())
    model = DecoderModel(
        spec.model, dtype=torch.float32, kernels=platform.kernels, max_model_len=LENGTH
    )
    for target in model.targets():
        target.load(0, torch.ones(target.shape))
    model.bind()
    worker = Worker(config, spec, platform=platform)
    worker.load(model)
    num_blocks = 1 + rows * LENGTH // BLOCK_SIZE
    worker.open_cache(num_blocks, LENGTH)
    assert worker.runner is not None
    worker.runner.backend.graphs._compute = _computed  # type: ignore[attr-defined]
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
    return EngineCore(Scheduler(SchedulerLimits(**sizes), kv), worker)


def _computed(shape: StepShape) -> Computed:
    tokens = DeviceTokens(
        torch.full((shape.samples,), 7), torch.ones(shape.samples, dtype=torch.bool)
    )
    return Computed(torch.zeros(shape.samples, 64), tokens)


def decoding(core: EngineCore, rows: int) -> None:
    """All requests have their first tokens, and the graph of this size exists."""
    for number in range(rows):
        core.handle(
            AddRequest(
                request_id=number,
                prompt_token_ids=[number % 900, 5, 6],
                decoding=Decoding(max_tokens=LENGTH - 8, end_token_ids=frozenset()),
            )
        )
    for _ in range(12):
        core.step()


def measure(rows: int, steps: int) -> dict[str, float]:
    core = null_core(rows)
    decoding(core, rows)
    launch, inside = core.executor.execute, [0.0]

    def timed(work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        inside[-1] += time.perf_counter() - start
        return result

    def execute(plan: StepPlan) -> Any:
        running = timed(lambda: launch(plan))
        return SimpleNamespace(step_id=plan.step_id, result=lambda: timed(running.result))

    core.executor.execute = execute  # type: ignore[method-assign]
    seconds = []
    for _ in range(steps):
        inside.append(0.0)
        seconds.append(timed_step(core))
    cuts = statistics.quantiles(seconds, n=10)
    return {
        "rows": rows,
        "median_us": cuts[4] * 1e6,
        "p90_us": cuts[8] * 1e6,
        "runner_us": statistics.median(inside[1:]) * 1e6,
    }


def timed_step(core: EngineCore) -> float:
    start = time.perf_counter()
    core.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    for rows in options.rows.split(","):
        print(json.dumps({k: round(v) for k, v in measure(int(rows), options.steps).items()}))


if __name__ == "__main__":
    main()

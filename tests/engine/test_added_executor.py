"""An executor is one file: a worker that runs in a thread of its own, one plan made while another runs."""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor

from quire.config import EngineConfig, from_flat
from quire.engine.assemble import build_core
from quire.engine.core import EngineCore
from quire.engine.setup import locate, resolve
from quire.executor.base import Executor
from quire.messages import StepPlan, StepResult
from quire.runner.footprint import Footprint, WorkerSpec
from quire.runner.worker import Worker
from quire.sampling.sampler import GrammarSource
from tests.scheduler.requests import add_request


class ThreadExecutor:
    max_in_flight = 2
    adapters = None

    def __init__(self, config: EngineConfig, spec: WorkerSpec, grammars: GrammarSource) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._worker = Worker(config, spec, grammars=grammars)
        self.plans: list[StepPlan] = []

    def load(self) -> Footprint:
        return self._thread.submit(self._worker.load).result()

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        self._thread.submit(self._worker.open_cache, num_blocks, max_model_len).result()

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        self.plans.append(plan)
        return self._thread.submit(lambda: self._worker.execute(plan).result())

    def prepare(self) -> bool:
        return self._thread.submit(self._worker.prepare).result()

    def sleep(self, level: int) -> None:
        self._thread.submit(self._worker.sleep, level).result()

    def wake_up(self) -> None:
        self._thread.submit(self._worker.wake_up).result()

    def close(self) -> None:
        self._thread.submit(self._worker.close).result()
        self._thread.shutdown()


def run(core: EngineCore) -> dict[int, list[int]]:
    rng = random.Random(0)
    outputs: dict[int, list[int]] = {}
    for request_id in range(6):
        prompt = [rng.randrange(10, 400) for _ in range(rng.randrange(3, 90))]
        outputs[request_id] = []
        core.handle(
            add_request(
                request_id, prompt, max_tokens=12, temperature=request_id % 2 * 0.9, seed=request_id
            )
        )
    while core.has_work:
        for update in core.step().updates:
            assert update.error is None
            outputs[update.request_id] += update.new_token_ids
    core.close()
    return outputs


def test_tokens_are_those_of_the_worker_in_this_thread() -> None:
    config = locate(
        from_flat(
            {"kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 4, "max_num_batched_tokens": 32}
        )
    )
    resolved = resolve(config)
    executors: list[ThreadExecutor] = []

    def create(config: EngineConfig, spec: WorkerSpec, grammars: GrammarSource) -> Executor:
        executors.append(ThreadExecutor(config, spec, grammars))
        return executors[0]

    inline, _ = build_core(config, resolved)
    threaded, _ = build_core(config, resolved, create)
    expected = run(inline)
    assert run(threaded) == expected and all(len(tokens) == 12 for tokens in expected.values())
    assert any(row.pending for plan in executors[0].plans for row in plan.rows), (
        "nothing overlapped"
    )

"""The host's processor as a worker's device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from quire.attention.base import AttentionBackend, KVCache
from quire.config import EngineConfig
from quire.kernels.memory import reserve_in_background
from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.runner.footprint import Footprint, WorkerSpec, estimate, host_memory
from quire.runner.model_runner import ModelRunner
from quire.runner.platform import StepRunner, make_cache
from quire.sampling.sampler import GrammarSource


class CPU:
    """A `Platform`. Steps run at once, in the caller's thread."""

    max_in_flight = 1

    def __init__(self, config: EngineConfig, spec: WorkerSpec) -> None:
        self._config = config
        self._spec = spec
        self._memory = host_memory()  # before anything is loaded
        torch.set_num_threads(config.runtime.cpu_threads or physical_cores())
        self.kernels = create_kernels(config.runtime.kernels)  # type: ignore[arg-type]

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def attention(self) -> AttentionBackend | None:
        return None

    def runner(self, model: DecoderModel, grammars: GrammarSource | None) -> StepRunner:
        return ModelRunner(
            model,
            self.kernels,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            grammars=grammars,
            logprobs_mode=self._config.model.logprobs_mode,
        )

    def footprint(self, runner: StepRunner) -> Footprint:
        """The estimate: pages are taken as they are touched, so there is nothing to measure yet."""
        return estimate(
            self._config,
            self._spec.model,
            self._memory,
            dtype_bytes=runner.model.dtype.itemsize,
            max_model_len=self._spec.max_model_len,
        )

    def cache(self, num_blocks: int) -> KVCache:
        """If somebody said how much memory the cache shall have, it is taken at once: a step does not wait
        for pages, and what does not fit fails at the start. A cache of the default size grows as it is used.
        """
        cache = make_cache(self._config, self._spec, self.kernels, num_blocks)
        options = self._config.cache
        if options.kv_cache_memory_bytes is not None or options.gpu_memory_utilization is not None:
            reserve_in_background(cache.storage)
        return cache

    def release(self) -> None:
        """The allocator returned large tensors' memory when they were dropped."""


def physical_cores() -> int:
    """Cores this process may use, hyper-threads of one core counted once."""
    allowed = os.sched_getaffinity(0)
    seen: set[str] = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                seen.add(file.read())
        except OSError:
            return len(allowed)
    return len(seen)

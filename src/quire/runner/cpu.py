"""The CPU as a worker's device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from quire.attention.base import AttentionBackend, KVCache
from quire.config import EngineConfig
from quire.kernels.base import Kernels
from quire.kernels.memory import reserve_in_background
from quire.kernels.select import create_kernels
from quire.messages import AdmittedRequest
from quire.models.decoder import DecoderModel
from quire.models.eager_pass import adapted_seats
from quire.runner.backend import StepInput, StepSamples
from quire.runner.following import NoSampler
from quire.runner.footprint import Footprint, WorkerSpec, estimate, host_memory
from quire.runner.platform import make_cache
from quire.runner.prompt_work import Score, score
from quire.runner.seats import Seats
from quire.sampling.sampler import Sampler, SamplingSeats
from quire.util.cores import default_threads

_NO_GUARD = nullcontext()


class CPU:
    """A `Platform` whose steps run at once, in the caller's thread."""

    max_in_flight = 1
    device = None

    def __init__(self, config: EngineConfig, spec: WorkerSpec) -> None:
        self._config = config
        self._spec = spec
        self._memory = host_memory()  # before anything is loaded
        torch.set_num_threads(
            config.runtime.cpu_threads or default_threads(config.parallel.data_parallel_size)
        )
        self.kernels = create_kernels(
            config.runtime.kernels,  # type: ignore[arg-type]
            activation_bits=config.runtime.cpu_activation_bits,
        )

    def active(self) -> AbstractContextManager[object]:
        return _NO_GUARD

    def attention(self) -> AttentionBackend | None:
        return None

    def backend(self, model: DecoderModel) -> CPUBackend:
        return CPUBackend(
            model,
            self.kernels,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            sampler=Sampler(self.kernels, logprobs_mode=self._config.model.logprobs_mode)
            if self._spec.samples
            else NoSampler(),
        )

    def footprint(self, model: DecoderModel) -> Footprint:
        """An estimate: pages are allocated as they are written, so it cannot be measured yet."""
        return estimate(
            self._config,
            self._spec.model,
            self._memory,
            dtype_bytes=model.dtype.itemsize,
            max_model_len=self._spec.max_model_len,
            draft=self._spec.draft,
        )

    def cache(self, num_blocks: int) -> KVCache:
        """If an option sets the cache's size, its memory is allocated at once: then no step waits for
        pages, and a cache that does not fit fails at the start. A cache of the default size grows as it
        is used.
        """
        cache = make_cache(self._config, self._spec, self.kernels, num_blocks)
        options = self._config.cache
        if options.kv_cache_memory_bytes is not None or options.gpu_memory_utilization is not None:
            reserve_in_background(cache.storage)
        return cache

    def release(self) -> None:
        """Nothing to do: the allocator frees large tensors when they are dropped."""


class CPUBackend:
    """A `StepBackend`: one recorded program for the forward pass, one call to sample."""

    def __init__(
        self,
        model: DecoderModel,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        sampler: Sampler | NoSampler,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._sampling = SamplingSeats(max_num_seqs, model.spec.vocab_size)
        self._sampler = sampler

    def active(self) -> AbstractContextManager[object]:
        return _NO_GUARD

    def open_cache(self, kv_cache: KVCache, seats: Seats) -> None:
        self._kv_cache = kv_cache
        self._pass = self._model.over(kv_cache)

    def admit(self, seat: int, request: AdmittedRequest) -> None:
        self._sampling.admit(seat, request)

    def release(self, seat: int) -> None:
        self._sampling.release(seat)

    @property
    def score(self) -> Score:
        return score

    def append(self, seat: int, token_ids: Sequence[int]) -> None:
        self._sampling.count(seat, token_ids)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._kernels.copy_blocks(self._kv_cache.pairs, pairs)

    def launch(self, step: StepInput) -> StepSamples:
        samples = self._compute(step)
        if self._model.taps:
            samples.tapped = self._pass.tapped
        return samples

    def _compute(self, step: StepInput) -> StepSamples:
        hidden: list[torch.Tensor] = []
        if not step.read_rows:
            logits = self._pass.forward(step.rows)
            if not len(step.sample_rows):
                return StepSamples.none()
        else:
            states = self._pass.hidden(step.rows)
            _, starts, counts, wanted = step.rows.rows[: step.rows.num_rows].T
            ends = np.cumsum(wanted)
            hidden = [states[ends[row] - wanted[row] : ends[row]] for row in step.read_rows]
            if not len(step.sample_rows):
                return StepSamples.none(hidden)
            back = (
                (starts + counts)[step.sample_rows] - step.positions + 1
            )  # counted from the row's end
            picked = torch.from_numpy(ends[step.sample_rows] - back)
            logits = self._model.compute_logits(
                states[picked], adapted_seats(step.rows, step.sample_seats)
            )
        sampled = self._sampler.sample(
            logits,
            self._sampling,
            step.sample_seats,
            step.positions,
            step.masks(),
            step.drafts,
        )
        return StepSamples(sampled.token_ids, sampled.valid, sampled.logprobs, hidden)

    def prepare(self) -> bool:
        return False

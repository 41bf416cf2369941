"""An engine core put together by hand, with random weights made where they stay or with a checkpoint."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench.gpu.lab import BF16, DEVICE

from quire.config import from_flat
from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, AddRequest, FinishReason, TokenLogprobs
from quire.models.decoder import DecoderModel
from quire.models.spec import ModelSpec
from quire.runner.device import CudaDevice, HostDevice
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.worker import Worker
from quire.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE = 16
CACHE_SHARE = 0.85
"""Of the memory free beside the weights, at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests and tokens of a step, tokens of a request, tokens to be cached if they fit."""

    seqs: int
    tokens: int
    length: int
    cached: int


@torch.inference_mode()
def build(
    spec: ModelSpec,
    limits: Limits,
    *,
    folder: Path | None = None,
    dtype: torch.dtype = BF16,
    eager: bool = False,
    invariant: bool = False,
) -> EngineCore:
    """folder: of a checkpoint; without one, weights are random, and the same each time."""
    sizes: dict[str, Any] = {
        "max_num_seqs": limits.seqs,
        "max_num_batched_tokens": limits.tokens,
        "max_model_len": limits.length,
    }
    config = from_flat({
        **sizes, "block_size": BLOCK_SIZE, "enforce_eager": eager, "batch_invariant": invariant,
    })  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    share = WorkerSpec(
        model=spec, directory=folder or Path(), dtype=name, kv_cache_dtype=name,
        device=DEVICE.type, max_model_len=limits.length,
    )  # fmt: skip
    gpu = GPU(config, share, CudaDevice() if DEVICE.type == "cuda" else HostDevice())
    worker = Worker(config, share, platform=gpu)
    worker.load(None if folder is not None else _random_model(spec, gpu, limits.length, dtype))
    num_blocks = 1 + -(-limits.cached // BLOCK_SIZE)
    if DEVICE.type == "cuda":
        block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * BLOCK_SIZE
        free, _ = torch.cuda.mem_get_info()
        num_blocks = min(num_blocks, int(CACHE_SHARE * free) // block_bytes)
    worker.open_cache(num_blocks, limits.length)
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
    return EngineCore(Scheduler(SchedulerLimits(**sizes), kv), worker)


def _random_model(spec: ModelSpec, gpu: GPU, length: int, dtype: torch.dtype) -> DecoderModel:
    """Made on the device: the weights that are loaded at random come from the host, slowly."""
    with gpu.active():
        model = DecoderModel(spec, dtype=dtype, kernels=gpu.kernels, max_model_len=length)
        torch.manual_seed(0)
        for target in model.targets():
            weights = torch.ones(target.shape, dtype=dtype, device=DEVICE)
            target.load(0, weights if target.kind == "norm" else weights.normal_(0, 0.02))
        model.bind()
    return model


def request(
    request_id: int, prompt: Sequence[int], output: int, *, logprobs: int | None = None
) -> AddRequest:
    """Greedy, to the end."""
    decoding = Decoding(max_tokens=output, logprobs=logprobs, seed=request_id)
    return AddRequest(request_id=request_id, prompt_token_ids=list(prompt), decoding=decoding)


def requests(
    spec: ModelSpec,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int,
    logprobs: int | None = None,
) -> list[AddRequest]:
    """lengths: prompt and output of each. Another seed has other ids and contents, which hit no prefix
    cache."""
    contents = random.Random(seed)
    return [
        request(
            seed * 10_000 + i, contents.choices(range(spec.vocab_size), k=prompt), output,
            logprobs=logprobs,
        )
        for i, (prompt, output) in enumerate(lengths)
    ]  # fmt: skip


@dataclass(slots=True)
class Driven:
    """What came of a run. ends, counts: of each step, seconds since the start and tokens sampled."""

    ends: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    complete: bool = True

    @property
    def seconds(self) -> float:
        """Until the last token."""
        pairs = zip(self.ends, self.counts, strict=True)
        return max((end for end, count in pairs if count), default=self.ends[-1])

    def steady(self, batch: int, skipped: int) -> list[float]:
        """Seconds of steps in which `batch` requests decoded, but for the first ones."""
        pairs = zip(self.ends, self.counts, strict=True)
        ends = [end for end, count in pairs if count == batch][skipped:]
        return [after - before for before, after in itertools.pairwise(ends)]


def drive(
    core: EngineCore,
    wanted: Sequence[AddRequest],
    *,
    later: Sequence[AddRequest] = (),
    limit_s: float = 1e9,
) -> Driven:
    """All at once, to their ends or until limit_s. later: come with the fifth step. Raises RuntimeError if
    a request fails."""
    driven = Driven(tokens={message.request_id: [] for message in (*wanted, *later)})
    for message in wanted:
        core.handle(message)
    start = time.perf_counter()
    while core.has_work and driven.complete:
        if len(driven.ends) == 4:
            for message in later:
                core.handle(message)
        updates = core.step().updates
        driven.ends.append(time.perf_counter() - start)
        driven.counts.append(sum(len(update.new_token_ids) for update in updates))
        driven.complete = driven.ends[-1] < limit_s
        for update in updates:
            if update.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"request {update.request_id}: {update.error}")
            driven.tokens[update.request_id] += update.new_token_ids
            if update.logprobs:
                driven.logprobs.setdefault(update.request_id, []).extend(update.logprobs)
    core.handle(AbortRequests(list(driven.tokens)))  # what was cut short, if anything was
    while core.has_work:
        core.step()
    return driven

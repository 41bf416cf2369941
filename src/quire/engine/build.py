"""Assemble an `EngineCore` with a real model. This is where torch comes in."""

from __future__ import annotations

import logging
import os
import time

import torch

from quire.attention.base import KVCache
from quire.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.memory import MemoryPlan
from quire.engine.setup import ResolvedModel, read_tokens
from quire.executor.inline import InlineExecutor
from quire.kernels.base import Kernels
from quire.kernels.memory import reserve_in_background
from quire.kernels.select import create_kernels
from quire.kvcache import KVCacheManager
from quire.messages import EngineReady
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.runner.model_runner import ModelRunner
from quire.scheduler import Scheduler, SchedulerLimits
from quire.structured.base import GrammarCompiler
from quire.structured.store import GrammarStore
from quire.weights.source import open_source

logger = logging.getLogger(__name__)


def build_core(config: EngineConfig, resolved: ResolvedModel) -> tuple[EngineCore, EngineReady]:
    """Load the model, allocate the KV cache, and join them with a scheduler."""
    if resolved.device == "cuda":
        from quire.engine.build_device import build_on_device
        from quire.runner.device import CudaDevice

        return build_on_device(config, resolved, CudaDevice())
    started = time.monotonic()
    memory = resolved.memory
    torch.set_num_threads(config.runtime.cpu_threads or physical_cores())
    kernels = create_kernels(config.runtime.kernels)  # type: ignore[arg-type]
    grammars = GrammarStore(lambda: grammar_compiler(resolved))

    def make_runner(model: DecoderModel | None) -> ModelRunner:
        cache = _make_cache(config, resolved)
        return ModelRunner(
            model or _load(config, resolved, kernels),
            cache,
            kernels,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=memory.max_model_len,
            grammars=grammars,
            logprobs_mode=config.model.logprobs_mode,
        )

    executor = InlineExecutor(make_runner(None), restart=make_runner)
    core = EngineCore(build_scheduler(config, memory), executor, grammars=grammars)
    return core, describe(resolved, memory, started)


def _load(config: EngineConfig, resolved: ResolvedModel, kernels: Kernels) -> DecoderModel:
    model: DecoderModel = load_model(
        resolved.spec,
        open_source(resolved.model_dir),
        dtype=getattr(torch, resolved.dtype),
        kernels=kernels,
        load_format=config.model.load_format,
        max_model_len=resolved.max_model_len,
        seed=config.model.seed,
    )
    return model


def _make_cache(config: EngineConfig, resolved: ResolvedModel) -> KVCache:
    cache = KVCache(
        num_layers=resolved.spec.num_layers,
        num_blocks=resolved.memory.num_blocks,
        num_kv_heads=resolved.spec.heads.num_kv_heads,
        head_dim=resolved.spec.heads.head_dim,
        block_size=resolved.memory.block_size,
        dtype=getattr(torch, resolved.dtype),
    )
    if _memory_is_given(config):
        reserve_in_background(cache.storage)
    return cache


def grammar_compiler(resolved: ResolvedModel) -> GrammarCompiler:
    """For the model's tokens; reads the tokenizer."""
    from quire.structured.guidance import GuidanceCompiler

    tokenizer, ends = read_tokens(resolved)
    return GuidanceCompiler(tokenizer, vocab_size=resolved.spec.vocab_size, eos_token_ids=ends.ids)


def describe(resolved: ResolvedModel, memory: MemoryPlan, started: float) -> EngineReady:
    return EngineReady(
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        vocab_size=resolved.spec.vocab_size,
        ledger=memory.rows(),
        weight_bytes=memory.weight_bytes,
        kv_bytes=memory.kv_bytes,
        load_seconds=time.monotonic() - started,
    )


def _memory_is_given(config: EngineConfig) -> bool:
    """Whether somebody said how much memory the cache shall have. Then it is taken at once: a step does not
    wait for pages, and what does not fit fails at the start. A cache of the default size grows as it is used.
    """
    cache = config.cache
    return cache.kv_cache_memory_bytes is not None or cache.gpu_memory_utilization is not None


def build_scheduler(config: EngineConfig, memory: MemoryPlan) -> Scheduler:
    """The scheduler alone, as the engine would run it. The simulator's entry too."""
    options = config.scheduler
    kv = KVCacheManager(
        memory.num_blocks,
        memory.block_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    limits = SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        watermark_blocks=int(config.cache.watermark * memory.num_blocks),
        long_prefill_token_threshold=options.long_prefill_token_threshold,
        enable_chunked_prefill=options.enable_chunked_prefill,
        policy=options.scheduling_policy,
    )
    return Scheduler(
        limits, kv, needs_token_before_next=lambda message: message.decoding.rules is not None
    )


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

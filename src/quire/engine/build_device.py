"""Assemble an `EngineCore` on an accelerator."""

from __future__ import annotations

import logging
import time

import torch

from quire.attention.base import AttentionMetadata, AttentionTask, KVCache
from quire.attention.select import create_attention
from quire.config import EngineConfig
from quire.engine.build import build_scheduler, describe, grammar_compiler
from quire.engine.core import EngineCore
from quire.engine.memory import MachineMemory, MemoryPlan, plan_memory
from quire.engine.setup import ResolvedModel
from quire.errors import ConfigError, MemoryFitError
from quire.executor.device import DeviceExecutor
from quire.kernels.triton.backend import TritonKernels
from quire.messages import EngineReady
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.runner.device import Device
from quire.runner.device_runner import DeviceRunner
from quire.structured.store import GrammarStore
from quire.weights.source import open_source

logger = logging.getLogger(__name__)


def build_on_device(
    config: EngineConfig, resolved: ResolvedModel, device: Device
) -> tuple[EngineCore, EngineReady]:
    """Load the model, run its largest step once, and give the KV cache what is left.

    Raises `MemoryFitError`, with the options and values that would fit.
    """
    started = time.monotonic()
    if config.model.logprobs_mode != "raw_logprobs":
        raise ConfigError(
            f"logprobs_mode {config.model.logprobs_mode!r} is not there on a GPU; leave it at raw_logprobs, "
            "or take --device cpu."
        )
    kernels = TritonKernels(device.torch_device, batch_invariant=config.runtime.batch_invariant)
    grammars = GrammarStore(lambda: grammar_compiler(resolved))

    def make_runner(model: DecoderModel | None) -> DeviceRunner:
        """As large as measured, whenever that was."""
        return DeviceRunner(
            model or _load(config, resolved, kernels, device),
            _cache(resolved, kernels, memory.num_blocks),
            kernels,
            device,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=memory.max_model_len,
            eager=config.runtime.enforce_eager,
            grammars=grammars,
        )

    try:
        model = _load(config, resolved, kernels, device)
        memory = _measure(config, resolved, model, kernels)
        runner = make_runner(model)
    except torch.OutOfMemoryError as error:
        raise MemoryFitError(
            f"The GPU's memory did not suffice ({str(error).splitlines()[0]}) Less of any of these gives "
            f"room: --gpu-memory-utilization (now {config.cache.gpu_memory_utilization or 0.9}), "
            f"--max-num-batched-tokens ({config.scheduler.max_num_batched_tokens}), --max-num-seqs "
            f"({config.scheduler.max_num_seqs}), --max-model-len ({resolved.max_model_len})."
        ) from None
    executor = DeviceExecutor(runner, overlap=config.runtime.async_scheduling, restart=make_runner)
    core = EngineCore(build_scheduler(config, memory), executor, grammars=grammars)
    return core, describe(resolved, memory, started)


def _load(
    config: EngineConfig, resolved: ResolvedModel, kernels: TritonKernels, device: Device
) -> DecoderModel:
    task = _attention_task(config, resolved, device)
    model: DecoderModel = load_model(
        resolved.spec,
        open_source(resolved.model_dir),
        dtype=getattr(torch, resolved.dtype),
        kernels=kernels,
        load_format=config.model.load_format,
        attention=create_attention(config.runtime.attention_backend, kernels, task),
        max_model_len=resolved.max_model_len,
        seed=config.model.seed,
    )
    return model


def _attention_task(config: EngineConfig, resolved: ResolvedModel, device: Device) -> AttentionTask:
    on_gpu = device.torch_device.type == "cuda"
    return AttentionTask(
        softcap=max(layer.attention.softcap for layer in resolved.spec.layers),
        head_dim=resolved.spec.heads.head_dim,
        dtype=getattr(torch, resolved.dtype),
        kv_dtype=getattr(torch, resolved.kv_cache_dtype),
        block_size=resolved.memory.block_size,
        capability=torch.cuda.get_device_capability(device.torch_device) if on_gpu else (0, 0),
        batch_invariant=config.runtime.batch_invariant,
    )


def _cache(resolved: ResolvedModel, kernels: TritonKernels, num_blocks: int) -> KVCache:
    return KVCache(
        num_layers=resolved.spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=resolved.spec.heads.num_kv_heads,
        head_dim=resolved.spec.heads.head_dim,
        block_size=resolved.memory.block_size,
        dtype=getattr(torch, resolved.kv_cache_dtype),
        kernels=kernels,
    )


def _measure(
    config: EngineConfig, resolved: ResolvedModel, model: DecoderModel, kernels: TritonKernels
) -> MemoryPlan:
    """The memory plan with what weights and the largest step take in fact. As resolved, off the GPU."""
    if kernels.device.type != "cuda":
        return resolved.memory
    cuda = torch.cuda
    cache = _cache(resolved, kernels, 1)
    kernels.reserve(
        cache.layers[0].k,
        q_heads=resolved.spec.heads.num_heads,
        max_requests=config.scheduler.max_num_seqs,
        max_len=resolved.max_model_len,
        windows={window or 0 for window in resolved.spec.windows},
    )
    cuda.synchronize()
    weights = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    _largest_step(config, model, cache)
    # Compiles what decoding needs (FlashInfer's takes minutes) before anyone waits for it.
    _run_step(model, cache, requests=1, tokens=1)
    cuda.synchronize()
    activations = cuda.max_memory_allocated() - weights
    free, total = cuda.mem_get_info()
    # What the context and libraries hold is neither ours to give nor in PyTorch's books.
    available = free + cuda.memory_reserved()
    cache_dtype = cache.storage.dtype
    del cache
    cuda.empty_cache()
    memory = plan_memory(
        config,
        resolved.spec,
        dtype_bytes=model.dtype.itemsize,
        kv_dtype_bytes=cache_dtype.itemsize,
        max_model_len=resolved.max_model_len,
        machine=MachineMemory(total=total, available=available),
        gpu=True,
        measured=(weights, activations),
    )
    logger.info("measured: weights %d MiB, largest step %d MiB", weights >> 20, activations >> 20)
    return memory


def _largest_step(config: EngineConfig, model: DecoderModel, cache: KVCache) -> None:
    """Prompts of the whole token budget, as many rows of logits as there may be."""
    tokens = min(config.scheduler.max_num_batched_tokens, model.max_model_len)
    requests = -(-config.scheduler.max_num_batched_tokens // tokens)
    hidden = _run_step(model, cache, requests=requests, tokens=tokens)
    # As the runner does: logits, and what edits of them are written to, in float32.
    model.compute_logits(hidden[: config.scheduler.max_num_seqs])


def _run_step(model: DecoderModel, cache: KVCache, *, requests: int, tokens: int) -> torch.Tensor:
    """Hidden states of new requests of so many tokens each; every key is read from one block."""
    device, size = cache.storage.device, cache.block_size
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
    positions = torch.arange(requests * tokens, device=device) % tokens
    metadata = AttentionMetadata(
        positions=positions,
        slot_mapping=torch.full_like(positions, -1),
        query_start_loc=starts,
        seq_lens=torch.full((requests,), tokens, dtype=torch.int32, device=device),
        block_table=torch.zeros(requests, -(-tokens // size), dtype=torch.int32, device=device),
        max_query_len=tokens,
    )
    return model.compute(torch.zeros_like(positions), metadata, cache)

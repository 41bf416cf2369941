"""Assemble an `EngineCore`: load, plan the memory, open the cache, schedule. Without torch, which comes with
the executor."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from quire.config import EngineConfig
from quire.dtypes import element_bytes
from quire.engine.core import EngineCore
from quire.engine.gpu import gpu_count, gpu_memory
from quire.engine.memory import MemoryPlan, check_tiers, format_bytes, plan_ranks, tier_rows
from quire.engine.setup import ResolvedModel, locate, read_tokens, resolve
from quire.errors import ConfigError, ModelError
from quire.executor.base import Executor
from quire.executor.ranks import Ranks
from quire.kv_layout import KVLayout
from quire.kvcache import ChangeStream, KVCacheManager, KVConnector
from quire.kvcache.retention import Retention
from quire.messages import EngineReady
from quire.runner.footprint import (
    DeviceMemory,
    Footprint,
    WorkerSpec,
    block_bytes,
    estimate,
    host_memory,
    spec_of_rank,
)
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.decisions import debug_log
from quire.scheduler.fitted import FittedCost
from quire.scheduler.record import Recorder
from quire.speculative.spec import HeadDraftSpec
from quire.structured.base import GrammarCompiler
from quire.structured.store import GrammarStore
from quire.weights.adapter import check_adapter, largest_adapter_bytes
from quire.weights.resolve import find_local

logger = logging.getLogger(__name__)

CreateExecutor = Callable[[EngineConfig, WorkerSpec, GrammarStore], Executor]


def build_core(
    config: EngineConfig,
    resolved: ResolvedModel,
    create_executor: CreateExecutor | None = None,
) -> tuple[EngineCore, EngineReady]:
    """Load the model, allocate the KV cache, and join them with a scheduler.

    create_executor: if None, of a worker in this process. Raises `ModelError`, `ConfigError` or
    `MemoryFitError`.
    """
    started = time.monotonic()
    if config.moves_kv:
        from quire.kvtransfer.create import named

        config = named(config)
    longest = _longest_by_estimate(config, resolved)
    grammars = GrammarStore(lambda: grammar_compiler(resolved))
    spec = worker_spec(resolved, longest)
    executor = (create_executor or executor_of())(config, spec, grammars)
    try:
        memory = plan(config, resolved, executor.load(), longest)
        executor.open_cache(memory.num_blocks, memory.max_model_len)
        gpu = resolved.device == "cuda"
        connector = _connector(config, executor)
        scheduler = build_scheduler(config, resolved.spec.kv, memory, gpu=gpu, connector=connector)
        events = _event_stream(config, scheduler)
    except BaseException:
        executor.close()
        raise
    core = EngineCore(
        scheduler,
        executor,
        grammars=grammars,
        max_adapters=config.lora.capacity,
        events=events,
    )
    ready = EngineReady(
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        vocab_size=resolved.spec.vocab_size,
        ledger=[*memory.rows(), *tier_rows(config), *_adapter_rows(config, resolved)],
        weight_bytes=memory.weight_bytes,
        kv_bytes=memory.kv_bytes,
        load_seconds=time.monotonic() - started,
    )
    return core, ready


def _connector(config: EngineConfig, executor: Executor) -> KVConnector | None:
    if not config.moves_kv:
        return None
    from quire.kvtransfer.create import create_connector

    return create_connector(config, lambda: executor.store)


def _event_stream(config: EngineConfig, scheduler: Scheduler) -> ChangeStream | None:
    events = config.kv_events.events
    if not events.is_on:
        return None
    if not scheduler.kv.enable_prefix_caching:
        logger.warning("kv_events_config has no effect without enable_prefix_caching")
        return None
    from quire.engine.kv_events import KVEventStream

    loading = scheduler.loading
    transfers = None if loading is None else loading.transfers
    return KVEventStream(
        events,
        scheduler.kv,
        transfers,
        rank=config.kv_events.rank,
        restarts=config.kv_events.restarts,
    )


def check_local(config: EngineConfig) -> None:
    """Raise at once the errors of a start that can be found without the network and without the weights."""
    model, tiers = config.model, config.kv_tiers
    if config.scheduler.cost_model is not None:
        FittedCost.load(config.scheduler.cost_model)
    if tiers.kv_disk_path is not None and tiers.disk_bytes:
        from quire.kvtransfer.disk_files import check_disk

        check_disk(tiers.kv_disk_path, tiers.disk_bytes)
    if (transfer := config.kv_transfer.transfer) is not None:
        from quire.kvtransfer.peering import key_of

        key_of(transfer)
    if model.chat_template is not None:
        from quire.text.chat_template import read_chat_template

        read_chat_template(model.chat_template)
    if model.model is not None and find_local(model.model) is None:
        return
    for directory in config.lora.lora_dir:
        if not Path(directory).expanduser().is_dir():
            raise ConfigError(f"lora_dir {directory!r} is not a directory.")
    if model.tokenizer is None or Path(model.tokenizer).expanduser().is_dir():
        located = locate(config)
        resolved = resolve(located)
        _longest_by_estimate(located, resolved)
        _check_modules(located, resolved)


def _adapter_rows(config: EngineConfig, resolved: ResolvedModel) -> list[tuple[str, str]]:
    """The ledger's line about adapters: the most that they may take, beside what is planned."""
    lora = config.lora
    if not lora.enable_lora:
        return []
    most = largest_adapter_bytes(resolved.spec, lora.max_lora_rank, element_bytes(resolved.dtype))
    what = f"adapters, if all {lora.capacity} have rank {lora.max_lora_rank}"
    return [(what, format_bytes(lora.capacity * most))]


def _check_modules(config: EngineConfig, resolved: ResolvedModel) -> None:
    """The configured adapters' files, all but their numbers."""
    served = config.model.served_model_name
    for module in config.lora.modules:
        if module.name in served:
            raise ConfigError(f"lora_modules: {module.name!r} is the name of the model itself.")
        try:
            check_adapter(
                Path(module.path).expanduser(), resolved.spec, max_rank=config.lora.max_lora_rank
            )
        except ModelError as error:
            raise type(error)(f"lora_modules: {module.name}: {error}") from None


def worker_spec(resolved: ResolvedModel, max_model_len: int) -> WorkerSpec:
    """Of the whole model; see `spec_of_rank`."""
    return WorkerSpec(
        model=resolved.spec,
        directory=resolved.model_dir,
        dtype=resolved.dtype,
        kv_cache_dtype=resolved.kv_cache_dtype,
        device=resolved.device,
        max_model_len=max_model_len,
        draft=resolved.draft,
    )


def executor_of(ranks: Ranks | None = None, *, pin: bool = False) -> CreateExecutor:
    """What makes the executor that the configuration names. ranks: that were started earlier. pin: whether
    this process may keep to its share of the cores."""

    def create(config: EngineConfig, spec: WorkerSpec, grammars: GrammarStore) -> Executor:
        if config.parallel.world_size > 1:
            from quire.executor.workers import start

            return start(config, spec, grammars, ranks, pin=pin)
        from quire.executor.inline import inline_executor

        return inline_executor(config, spec, grammars)

    return create


def _longest_by_estimate(config: EngineConfig, resolved: ResolvedModel) -> int:
    """The length to load for. A model that cannot fit is refused here, before its weights are read."""
    _check_ranks(config, resolved)
    _check_stages(config, resolved)
    footprint = estimate_ranks(config, resolved, device_memory(resolved.device))
    longest = plan(config, resolved, footprint, resolved.max_model_len).max_model_len
    scheduler = config.scheduler
    if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < longest:
        raise ConfigError(
            f"without chunked prefill a whole prompt must fit a step: max_num_batched_tokens "
            f"({scheduler.max_num_batched_tokens}) is less than max_model_len ({longest}). "
            "Raise the first, lower the second, or leave chunking on."
        )
    return longest


def _check_ranks(config: EngineConfig, resolved: ResolvedModel) -> None:
    here = config.parallel.world_size // config.parallel.nnodes
    if resolved.device == "cuda" and here > max(1, gpu_count()):
        raise ConfigError(
            f"{here} ranks on this machine (tensor_parallel_size x pipeline_parallel_size) need a GPU each, "
            f"and there are {gpu_count()}; make the sizes smaller, or use --device cpu."
        )


def _check_stages(config: EngineConfig, resolved: ResolvedModel) -> None:
    if config.parallel.pipeline_parallel_size == 1:
        return
    for is_so, what in (
        (resolved.device == "cuda", "device cuda"),
        (
            isinstance(resolved.draft, HeadDraftSpec),
            "method eagle, eagle3 or mtp of speculative_config",
        ),
        (
            resolved.kv_cache_dtype.startswith("float8") and len(resolved.spec.kv.groups) > 1,
            "kv_cache_dtype fp8 of a model whose layers differ in their windows",
        ),
    ):
        if is_so:
            raise ConfigError(
                f"pipeline_parallel_size above 1 does not work with {what} yet; use tensor_parallel_size."
            )


def device_memory(device: str) -> DeviceMemory:
    """What is free now."""
    return (gpu_memory() if device == "cuda" else None) or host_memory()


def estimate_ranks(
    config: EngineConfig, resolved: ResolvedModel, memory: DeviceMemory
) -> Footprint:
    """Of all ranks, before anything is loaded. memory: of each one's device, or of the machine."""
    ranks = [
        estimate(
            config,
            part.model,
            memory,
            dtype_bytes=element_bytes(resolved.dtype),
            max_model_len=resolved.max_model_len,
            draft=part.draft,
        )
        for part in parts_of(config, resolved)
    ]
    return ranks[0] if len(ranks) == 1 else Footprint.of_ranks(ranks)


def parts_of(config: EngineConfig, resolved: ResolvedModel) -> list[WorkerSpec]:
    """Of each rank."""
    whole = worker_spec(resolved, resolved.max_model_len)
    numbers = range(config.parallel.world_size)
    return [spec_of_rank(whole, config.parallel, number) for number in numbers]


def plan(
    config: EngineConfig, resolved: ResolvedModel, footprint: Footprint, longest: int
) -> MemoryPlan:
    gpu = resolved.device == "cuda"
    found = plan_ranks(
        config,
        resolved.spec,
        footprint.ranks or (footprint,),
        [block_bytes(config, part) for part in parts_of(config, resolved)],
        max_model_len=longest,
        may_shrink=config.model.max_model_len == -1,
        gpu=gpu,
    )
    if config.moves_kv:
        memory = host_memory() if gpu else footprint.memory
        check_tiers(config, found, memory.available, gpu=gpu)
    return found


def build_scheduler(
    config: EngineConfig,
    layout: KVLayout,
    memory: MemoryPlan,
    *,
    gpu: bool = False,
    connector: KVConnector | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Scheduler:
    """The engine's scheduler, without a model. On a GPU the counts of penalties are updated as tokens are
    sampled, so a request with penalties samples one token a step, and its buffers have room for
    `max_num_seqs` samples."""
    options = config.scheduler
    record = None
    if options.decision_record_bytes:
        record = Recorder(options.decision_record_bytes, clock=clock, config_hash=_hash(config))
        clock = record.clock
    kv = KVCacheManager(
        memory.num_blocks,
        memory.block_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        windows=layout.windows,
        max_row_tokens=options.max_num_batched_tokens,
        retention=Retention.of_blocks(
            memory.num_blocks - 1, config.cache.retained_cache_share, len(layout.windows), clock
        ),
    )
    limits = SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        watermark_blocks=int(config.cache.watermark * memory.num_blocks),
        long_prefill_token_threshold=options.long_prefill_token_threshold,
        enable_chunked_prefill=options.enable_chunked_prefill,
        itl_target=(options.itl_target or 0.0) / 1000,
        cost_file=""
        if options.cost_model is None
        else FittedCost.load(options.cost_model).numbers(),
        policy="fcfs" if options.scheduling_policy == "auto" else options.scheduling_policy,
        aging=options.priority_aging,
        max_adapters=config.lora.max_loras,
        max_samples=options.max_num_seqs if gpu else config.max_samples,
        max_drafts=config.max_drafts,
        stages=config.parallel.pipeline_parallel_size,
        least_prompt_tokens=256 if gpu else 64,
        fails_with_loads=config.kv_load_failure_policy == "fail",
    )
    return Scheduler(
        limits,
        kv,
        clock=clock,
        needs_token_before_next=lambda message: message.decoding.rules is not None,
        takes_drafts=lambda message: not (gpu and message.decoding.has_penalties),
        observe=debug_log(),
        record=record,
        connector=connector,
    )


def _hash(config: EngineConfig) -> str:
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()[:16]


def grammar_compiler(resolved: ResolvedModel) -> GrammarCompiler:
    """The grammar compiler for the model's tokens; reads the tokenizer."""
    from quire.structured.guidance import GuidanceCompiler

    tokenizer, ends = read_tokens(resolved)
    return GuidanceCompiler(tokenizer, vocab_size=resolved.spec.vocab_size, eos_token_ids=ends.ids)

"""The size of the KV cache, and the error if memory is not enough."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quire.config import CacheConfig, EngineConfig
from quire.errors import MemoryFitError
from quire.models.spec import ModelSpec
from quire.runner.footprint import Footprint

DEFAULT_CPU_SHARE = 0.5
"""Share of the memory that is available now; the rest is for the page cache and other programs."""
DEFAULT_GPU_SHARE = 0.9
"""Share of the GPU's memory; the rest is for the driver's context, CUDA graphs and libraries."""
GPU_RESERVE = 512 << 20
"""Bytes of a GPU that the plan leaves free, whatever the share: for CUDA graphs, and tables that
only some requests need."""

LESS_OR_MORE = (
    "Divide the model among more devices (--tensor-parallel-size, --pipeline-parallel-size), store it in "
    "fewer bits (--quantization), or take devices with more memory."
)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The ledger: what the memory is used for, and how much fits."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_blocks: int
    """The null block included."""
    sequence_blocks: int
    """Of one sequence of full length, in all groups of layers."""
    block_size: int
    max_model_len: int
    total_bytes: int
    ranks: tuple[tuple[Footprint, int], ...] = ()
    """Of several ranks, each one's footprint and its KV of one block, in bytes."""

    @property
    def full_length_sequences(self) -> float:
        """The number of sequences of full length that fit at once."""
        return (self.num_blocks - 1) / self.sequence_blocks

    @property
    def kv_tokens(self) -> int:
        """Tokens of such sequences that the cache holds. More than slots where layers keep a window only."""
        return (self.num_blocks - 1) * self.max_model_len // self.sequence_blocks

    def rows(self) -> list[tuple[str, str]]:
        """The ledger as text. It has a line for each rank if they differ."""
        each = [
            f"weights {format_bytes(rank.weight_bytes)}, KV cache {format_bytes(block * self.num_blocks)}"
            for rank, block in self.ranks
        ]
        differ = enumerate(each) if len(set(each)) > 1 else ()
        return [
            ("machine memory", format_bytes(self.total_bytes)),
            ("weights", format_bytes(self.weight_bytes)),
            ("activations (largest step)", format_bytes(self.activation_bytes)),
            ("KV cache", format_bytes(self.kv_bytes)),
            ("KV blocks", f"{self.num_blocks - 1:,} of {self.block_size} tokens"),
            ("KV tokens", f"{self.kv_tokens:,}"),
            (
                f"sequences of {self.max_model_len:,} tokens",
                f"{self.full_length_sequences:,.1f} at once",
            ),
            *((f"rank {number}", text) for number, text in differ),
        ]


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    footprint: Footprint,
    *,
    block_bytes: int,
    max_model_len: int,
    may_shrink: bool = False,
    gpu: bool = False,
) -> MemoryPlan:
    """Size the KV cache.

    block_bytes: of one block, in all that footprint is of. may_shrink: a shorter length is accepted if
    max_model_len does not fit. gpu: the memory is a GPU's.

    Raises `MemoryFitError`, with the options and values that would fit, if not even one sequence of
    full length does.
    """
    cache, size = config.cache, config.cache.block_size
    replicas = 1 if gpu else config.parallel.data_parallel_size
    layout = spec.kv
    row_tokens = config.scheduler.max_num_batched_tokens

    def blocks_for(num_tokens: int) -> int:
        return layout.blocks_for(num_tokens, size, max_row_tokens=row_tokens)

    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
    else:
        useful = config.scheduler.max_num_seqs * blocks_for(max_model_len)
        budget = kv_budget(cache, footprint, gpu=gpu, replicas=replicas)
        num_blocks = min(max(0, budget) // block_bytes, useful + 1)
    fits = _longest(blocks_for, max(0, num_blocks - 1), max_model_len, size)
    if may_shrink:
        max_model_len = min(max_model_len, fits)
    if max_model_len < 1 or fits < max_model_len:
        needed = (blocks_for(max_model_len) + 1) * block_bytes
        raise _does_not_fit(cache, max_model_len, fits, needed, block_bytes, footprint, replicas)
    _check_given_bytes(cache, num_blocks * block_bytes, footprint, replicas)
    return MemoryPlan(
        weight_bytes=footprint.weight_bytes,
        activation_bytes=footprint.step_bytes,
        kv_bytes=num_blocks * block_bytes,
        num_blocks=num_blocks,
        sequence_blocks=blocks_for(max_model_len),
        block_size=size,
        max_model_len=max_model_len,
        total_bytes=footprint.memory.total,
    )


def plan_ranks(
    config: EngineConfig,
    spec: ModelSpec,
    footprints: Sequence[Footprint],
    block_bytes: Sequence[int],
    *,
    max_model_len: int,
    may_shrink: bool = False,
    gpu: bool = False,
) -> MemoryPlan:
    """Size the cache of all ranks: as many blocks as the tightest memory holds. A GPU is one rank's; a
    machine is shared by its ranks. footprints, block_bytes: of each rank. Else as `plan_memory`."""
    ranks = tuple(zip(footprints, block_bytes, strict=True))
    together = 1 if gpu else len(ranks) // config.parallel.nnodes
    plans = []
    for first in range(0, len(ranks), together):
        these = ranks[first : first + together]
        plan = plan_memory(
            config,
            spec,
            these[0][0] if together == 1 else Footprint.of_ranks([each for each, _ in these]),
            block_bytes=sum(block for _, block in these),
            max_model_len=max_model_len,
            may_shrink=may_shrink,
            gpu=gpu,
        )
        plans.append(plan)
    tightest = min(plans, key=lambda plan: plan.num_blocks)
    if len(ranks) == 1:
        return tightest
    return replace(
        tightest,
        weight_bytes=sum(each.weight_bytes for each in footprints),
        activation_bytes=sum(each.step_bytes for each in footprints),
        kv_bytes=tightest.num_blocks * sum(block_bytes),
        total_bytes=sum(plan.total_bytes for plan in plans),
        ranks=ranks,
    )


def tier_rows(config: EngineConfig) -> list[tuple[str, str]]:
    """The ledger's lines about KV outside the cache, of one replica."""
    options, ranks = config.kv_tiers, config.parallel.world_size
    ram, beside = options.ram_bytes(ranks), config.host_bytes(tier=False)
    rows = [
        ("KV in host memory, compressed", ranks * ram),
        ("KV on its way, at most", ranks * beside),
        (f"KV on disk, {options.kv_disk_path}", options.disk_bytes),
    ]
    return [(name, format_bytes(size)) for name, size in rows if size]


def check_tiers(config: EngineConfig, plan: MemoryPlan, available: int, *, gpu: bool) -> None:
    """plan: of one replica. available: bytes of this machine before anything is loaded. Raises
    `MemoryFitError` if KV in host memory, outside the cache, does not fit beside the rest."""
    parallel, each = config.parallel, config.host_bytes()
    here = parallel.world_size // parallel.nnodes
    others = 0 if gpu else plan.weight_bytes + plan.activation_bytes + plan.kv_bytes
    left = available // parallel.data_parallel_size - others // parallel.nnodes
    if here * each <= left:
        return
    beside = config.host_bytes(tier=False)
    most = max(0.0, (left / here - beside) / 2**30 - 0.005)  # rounded down
    remedy = f"Set --swap-space {most:.2f} or less"
    if config.kv_tiers.kv_offloading_size:
        remedy = f"Set --kv-offloading-size {most * parallel.world_size:.2f} or less"
    transfer, over = config.kv_transfer.transfer, beside - left // here
    if over > 0 and transfer is not None:
        fits = max(0, transfer.kv_buffer_size - over)
        remedy = f"Set kv_buffer_size (--kv-transfer-config) to {fits} or less"
    raise MemoryFitError(
        f"{format_bytes(here * each)} of host memory for KV ({here} x {format_bytes(each)}) do not fit in "
        f"the {format_bytes(max(0, left))} that are left of {format_bytes(available)} beside the rest. "
        f"{remedy}, or make the KV cache smaller (--kv-cache-memory-bytes)."
    )


def _longest(
    blocks_for: Callable[[int], int], num_blocks: int, wanted: int, block_size: int
) -> int:
    """The longest sequence that this many blocks hold, in whole blocks; or `wanted` if that is less."""
    if blocks_for(wanted) <= num_blocks:
        return wanted
    whole = range(0, wanted, block_size)
    return whole[bisect_right(whole, num_blocks, key=blocks_for) - 1]


def kv_budget(cache: CacheConfig, footprint: Footprint, *, gpu: bool, replicas: int) -> int:
    """replicas: that share the memory."""
    memory, others = footprint.memory, footprint.weight_bytes + footprint.step_bytes
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    share = cache.gpu_memory_utilization
    if gpu:
        allowed = int(memory.total * (DEFAULT_GPU_SHARE if share is None else share))
        return min(allowed, memory.available - GPU_RESERVE) - others
    if share is not None:
        return int(memory.total * share) // replicas - others
    return int(memory.available * DEFAULT_CPU_SHARE) // replicas - others


def _check_given_bytes(
    cache: CacheConfig, kv_bytes: int, footprint: Footprint, replicas: int
) -> None:
    """Bytes that are given are not compared with what is available, which changes, but with what there is."""
    left = footprint.memory.total // replicas - footprint.weight_bytes - footprint.step_bytes
    if cache.kv_cache_memory_bytes is not None and kv_bytes > left:
        raise MemoryFitError(
            f"A KV cache of {format_bytes(kv_bytes)} does not fit in the {format_bytes(left)} that weights "
            f"and activations leave of {format_bytes(footprint.memory.total)}. "
            f"Set --kv-cache-memory-bytes {left} or less, or leave it out."
        )


def _does_not_fit(
    cache: CacheConfig,
    longest: int,
    fits: int,
    needed: int,
    block_bytes: int,
    footprint: Footprint,
    replicas: int,
) -> MemoryFitError:
    memory, others = footprint.memory, footprint.weight_bytes + footprint.step_bytes
    weights, step = format_bytes(footprint.weight_bytes), format_bytes(footprint.step_bytes)
    besides = f"{weights} of weights and {step} of activations"
    if others >= memory.total and cache.num_gpu_blocks_override is None:
        return MemoryFitError(
            f"{besides} do not fit in {format_bytes(memory.total)} of memory. {LESS_OR_MORE}"
        )
    share = min(1.0, replicas * (needed + others) / memory.total + 0.005)
    remedies = []
    if fits >= cache.block_size:
        remedies.append(f"--max-model-len {fits} (or -1 to fit it to memory)")
    if cache.num_gpu_blocks_override is not None:
        remedies.append(f"--num-gpu-blocks-override {needed // block_bytes}")
    elif replicas * (needed + others) < memory.total:
        remedies += [f"--kv-cache-memory-bytes {needed}", f"--gpu-memory-utilization {share:.2f}"]
    remedy = f"Any of these would do: {'; '.join(remedies)}." if remedies else LESS_OR_MORE
    return MemoryFitError(
        f"One sequence of {longest:,} tokens needs {format_bytes(needed)} of KV cache, but only "
        f"{fits:,} tokens fit beside {besides} in {format_bytes(memory.total)} of memory "
        f"({format_bytes(memory.available)} available). {remedy}"
    )


def format_bytes(count: int) -> str:
    """1234567890 -> "1.15 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"

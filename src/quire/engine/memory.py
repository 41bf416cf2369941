"""How much memory there is, who gets it, and what to say when it is not enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire.config import CacheConfig, EngineConfig
from quire.errors import MemoryFitError
from quire.models.spec import ModelSpec

DEFAULT_CPU_SHARE = 0.5
"""Of the memory now available: the rest stays for the page cache and everyone else on the machine."""
DEFAULT_GPU_SHARE = 0.9
"""Of all there is: the rest is for the driver's context, recorded graphs and what libraries take."""


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Bytes, as this process sees them (a container's limit counts)."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The ledger: who gets which bytes, and what fits."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_blocks: int
    """With the null block."""
    block_size: int
    max_model_len: int
    total_bytes: int

    @property
    def kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    @property
    def full_length_sequences(self) -> float:
        return self.kv_tokens / self.max_model_len

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
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
        ]


def machine_memory() -> MachineMemory:
    """From /proc/meminfo, bounded by the control group's limit."""
    fields: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields["MemFree"])
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        total, available = min(total, limit), min(available, limit)
    return MachineMemory(total, available)


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    *,
    dtype_bytes: int,
    kv_dtype_bytes: int | None = None,
    max_model_len: int | None,
    machine: MachineMemory | None = None,
    gpu: bool = False,
    measured: tuple[int, int] | None = None,
) -> MemoryPlan:
    """Size the KV cache. `max_model_len` None means "as long as fits, up to the model's own".

    kv_dtype_bytes: of the cache's elements, if not dtype_bytes. machine: the memory to share out, the
    host's if None; gpu: it is a GPU's. measured: bytes of weights and of the largest step's activations,
    where they are known and need not be estimated.

    Raises `MemoryFitError`, with the options and values that would fit, if not even one sequence of
    full length does.
    """
    machine = machine or machine_memory()
    cache, size = config.cache, config.cache.block_size
    activations = _activation_bytes(config, spec, dtype_bytes)
    block_bytes = spec.kv_bytes_per_token(kv_dtype_bytes or dtype_bytes) * size
    longest = max_model_len or spec.context_length
    rotary_tables = 4 * longest * sum(rope.rotary_dim for rope in spec.ropes)
    weights = spec.weight_bytes(dtype_bytes) + rotary_tables
    if measured is not None:
        weights, activations = measured
    budget = _kv_budget(cache, machine, weights + activations, gpu=gpu)
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
    else:
        useful = config.scheduler.max_num_seqs * -(-longest // size)
        num_blocks = min(max(0, budget) // block_bytes, useful + 1)
    usable_tokens = max(0, num_blocks - 1) * size
    if max_model_len is None:
        longest = min(longest, usable_tokens)
    if longest < 1 or usable_tokens < longest:
        raise _does_not_fit(
            cache, longest, usable_tokens, block_bytes, weights, activations, machine
        )
    return MemoryPlan(
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes=num_blocks * block_bytes,
        num_blocks=num_blocks,
        block_size=size,
        max_model_len=longest,
        total_bytes=machine.total,
    )


def _kv_budget(cache: CacheConfig, machine: MachineMemory, others: int, *, gpu: bool) -> int:
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    if cache.gpu_memory_utilization is not None:
        return int(machine.total * cache.gpu_memory_utilization) - others
    if gpu:
        return min(int(machine.total * DEFAULT_GPU_SHARE), machine.available) - others
    return int(machine.available * DEFAULT_CPU_SHARE) - others


def _activation_bytes(config: EngineConfig, spec: ModelSpec, dtype_bytes: int) -> int:
    """The largest step's temporaries: one layer's widest tensors, and the logits in float32."""
    scheduler = config.scheduler
    widest = max(
        2 * (layer.attention.q_size + 2 * layer.attention.kv_size) + 3 * layer.mlp.intermediate_size
        for layer in spec.layers
    )
    width = 3 * spec.hidden_size + widest
    logits = 3 * 4 * scheduler.max_num_seqs * spec.vocab_size
    return scheduler.max_num_batched_tokens * width * dtype_bytes + logits


def _does_not_fit(
    cache: CacheConfig,
    longest: int,
    fits: int,
    block_bytes: int,
    weights: int,
    activations: int,
    machine: MachineMemory,
) -> MemoryFitError:
    needed = (-(-longest // cache.block_size) + 1) * block_bytes
    share = min(1.0, (needed + weights + activations) / machine.total + 0.005)
    if cache.num_gpu_blocks_override is not None:
        remedies = [f"--num-gpu-blocks-override {needed // block_bytes}"]
    else:
        remedies = [f"--kv-cache-memory-bytes {needed}"]
    if cache.num_gpu_blocks_override is None and needed + weights + activations < machine.total:
        remedies.append(f"--gpu-memory-utilization {share:.2f}")
    if fits >= cache.block_size:
        remedies.insert(0, f"--max-model-len {fits} (or -1 to fit it to memory)")
    return MemoryFitError(
        f"One sequence of {longest:,} tokens needs {format_bytes(needed)} of KV cache, but only "
        f"{fits:,} tokens fit beside {format_bytes(weights)} of weights and "
        f"{format_bytes(activations)} of activations in {format_bytes(machine.total)} of memory "
        f"({format_bytes(machine.available)} available). Any of these would do: "
        + "; ".join(remedies)
        + "."
    )


def format_bytes(count: int) -> str:
    """1234567890 -> "1.15 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"

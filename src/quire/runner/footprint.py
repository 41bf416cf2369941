"""The model that a worker loads, and its memory. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.config import EngineConfig
from quire.config.parallel import ParallelConfig
from quire.dtypes import element_bytes
from quire.models.spec import ModelSpec
from quire.models.stages import staged
from quire.speculative.spec import DraftSpec, HeadDraftSpec


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One device's share of the model."""

    model: ModelSpec
    directory: Path
    dtype: str
    """Dtype of weights and activations, by torch's name."""
    kv_cache_dtype: str
    device: str
    """"cpu" or "cuda"."""
    max_model_len: int
    """The most tokens of a request. The cache may hold fewer."""
    draft: DraftSpec | HeadDraftSpec | None = None
    rank: int = 0
    """Of all ranks of the replica: stage * tensor_parallel_size + rank in the stage."""
    samples: bool = True
    """Whether this rank samples. The others follow it: `quire.runner.following`."""
    taps: tuple[int, ...] = ()
    """Of all ranks, for `DecoderModel.taps`: they decide which rows are gathered."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes available to this process (a container's limit counts)."""

    total: int
    available: int
    """Bytes that are free or belong to this worker."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of a model without its KV cache, in bytes, measured or estimated."""

    weight_bytes: int
    step_bytes: int
    """Temporaries of the largest step."""
    memory: DeviceMemory
    ranks: tuple[Footprint, ...] = ()
    """Of several ranks, those of each."""

    @classmethod
    def of_ranks(cls, ranks: Sequence[Footprint]) -> Footprint:
        """On one machine. Its memory is what was free before the first of them was loaded."""
        return cls(
            weight_bytes=sum(each.weight_bytes for each in ranks),
            step_bytes=sum(each.step_bytes for each in ranks),
            memory=max((each.memory for each in ranks), key=lambda memory: memory.available),
            ranks=tuple(ranks),
        )


def spec_of_rank(spec: WorkerSpec, parallel: ParallelConfig, number: int) -> WorkerSpec:
    """A rank's part. spec: of the whole."""
    samples = number == parallel.world_size - parallel.tensor_parallel_size
    size = parallel.tensor_parallel_size
    model = spec.model if size == 1 else spec.model.divided(number % size, size)
    model = staged(
        model,
        number // size,
        parallel.pipeline_parallel_size,
        dtype_bytes=element_bytes(spec.dtype),
        partition=parallel.pipeline_layer_partition,
    )
    draft, taps = spec.draft, spec.taps
    if isinstance(draft, HeadDraftSpec):
        taps = draft.head.taps
        if size > 1:
            draft = dataclasses.replace(draft, copied_from=spec.directory)
    return dataclasses.replace(
        spec,
        model=model,
        rank=number,
        samples=samples,
        draft=draft if samples else None,
        taps=taps,
    )


def block_bytes(config: EngineConfig, spec: WorkerSpec) -> int:
    """KV of one block, a draft model's included."""
    size = config.cache.block_size
    slot = 0 if spec.draft is None else spec.draft.slot_bytes
    return spec.model.kv.page_bytes(size, element_bytes(spec.kv_cache_dtype)) + size * slot


def estimate(
    config: EngineConfig,
    spec: ModelSpec,
    memory: DeviceMemory,
    *,
    dtype_bytes: int,
    max_model_len: int,
    draft: DraftSpec | HeadDraftSpec | None = None,
) -> Footprint:
    """Estimate from the model's shape, before anything is loaded. A draft's weights are counted too; its
    steps use the memory of the target's."""
    rotary_tables = sum(rope.table_bytes(max_model_len) for rope in spec.ropes)
    drafts = 0 if draft is None else draft.weight_bytes
    return Footprint(
        weight_bytes=spec.weight_bytes(dtype_bytes) + rotary_tables + drafts,
        step_bytes=step_bytes(config, spec, dtype_bytes),
        memory=memory,
    )


def step_bytes(config: EngineConfig, spec: ModelSpec, dtype_bytes: int) -> int:
    """The largest step's temporaries: one layer's widest tensors, and the logits in float32. Of what ranks
    share, a rank holds its columns."""
    heads = spec.heads
    inner = max(layer.mlp.intermediate_size for layer in spec.layers)
    widest = 2 * (heads.q_size + 2 * heads.kv_size) + 3 * len(spec.share.columns(inner))
    width = 3 * spec.hidden_size + widest
    logits = 3 * 4 * config.max_samples * spec.vocab_size
    return config.scheduler.max_num_batched_tokens * width * dtype_bytes + logits


def group_bytes(config: EngineConfig, spec: ModelSpec, dtype_bytes: int) -> int:
    """The most memory that the program of a step shares with other ranks: the gathered tensors of a layer, a
    lookup's columns of each rank, and the logits."""
    whole = spec.layers[0].attention
    inner = max(layer.mlp.intermediate_size for layer in spec.layers)
    ranks = config.parallel.tensor_parallel_size
    width = (2 + ranks) * spec.hidden_size + 2 * whole.q_size + whole.kv_size + inner
    row = width * dtype_bytes + 8 * 64  # each buffer begins at a cache line
    logits = 4 * config.max_samples * spec.vocab_size
    return config.scheduler.max_num_batched_tokens * row + logits + 64


def host_memory() -> DeviceMemory:
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
        except (OSError, ValueError):  # the file is absent, or says "max"
            continue
        total, available = min(total, limit), min(available, limit)
    return DeviceMemory(total, available)

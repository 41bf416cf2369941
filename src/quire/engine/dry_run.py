"""What each device would hold, from the model's config alone: without weights, a device or torch.

The numbers are those with which a start plans (`quire.engine.assemble`); here they are only printed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import EngineConfig
from quire.dtypes import element_bytes
from quire.engine.assemble import device_memory, estimate_ranks, parts_of, plan
from quire.engine.memory import MemoryPlan, format_bytes
from quire.engine.setup import ResolvedModel, locate, resolve
from quire.errors import CheckpointError, ConfigError, MemoryFitError
from quire.models.known import known_config
from quire.quantization.base import LinearShape
from quire.runner.footprint import DeviceMemory, Footprint, WorkerSpec
from quire.weights.resolve import find_local
from quire.weights.safetensors import read_json

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer
    from quire.weights.source import Checkpoint


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigOnly:
    """A `ModelSource` of a config alone."""

    fields: Mapping[str, object]

    def config(self) -> dict[str, object]:
        return dict(self.fields)

    def generation_config(self) -> dict[str, object]:
        return {}

    def tokenizer(self) -> Tokenizer:
        raise CheckpointError("a config has no tokenizer")

    def open(self) -> Checkpoint:
        raise CheckpointError("a config has no weights")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A configuration, its model as numbers, and the memory of each device, or of the machine."""

    config: EngineConfig
    resolved: ResolvedModel
    memory: DeviceMemory

    @cached_property
    def footprint(self) -> Footprint:
        """Of all ranks, estimated."""
        return estimate_ranks(self.config, self.resolved, self.memory)

    def memory_plan(self) -> MemoryPlan:
        """Raises `MemoryFitError`."""
        return plan(self.config, self.resolved, self.footprint, self.resolved.max_model_len)


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """The plan, or why there is none."""

    lines: tuple[str, ...]
    error: MemoryFitError | None


def dry_run(
    config: EngineConfig, *, hf_config: str | None = None, memory_bytes: int | None = None
) -> Ledger:
    """hf_config: a directory, a config.json, or the name of a known model; None: `config.model`, which must
    be on this machine. memory_bytes: of each device, which is then a GPU unless `config` says cpu; None: what
    is here.

    Raises `ConfigError` or `ModelError`.
    """
    source = None if hf_config is None else ConfigOnly(read_config(hf_config))
    if source is not None:
        model = dataclasses.replace(config.model, model=hf_config, load_format="dummy")
        config = dataclasses.replace(config, model=model)
    return _ledger(prepare(config, source, memory_bytes=memory_bytes))


def prepare(
    config: EngineConfig, source: ConfigOnly | None, *, memory_bytes: int | None = None
) -> Prepared:
    """What a start knows before anything is loaded. source: instead of the model's files, which must be on
    this machine. memory_bytes: as in `dry_run`. Raises `ConfigError` or `ModelError`."""
    wanted = config.runtime.device
    if memory_bytes is not None:  # the device need not be here
        runtime = dataclasses.replace(config.runtime, device="cpu")
        config = dataclasses.replace(config, runtime=runtime)
    if source is None:
        if config.model.model is not None and find_local(config.model.model) is None:
            raise ConfigError(
                f"a dry run downloads nothing, and {config.model.model!r} is not on this machine; "
                "name its config with --hf-config."
            )
        config = locate(config)
    resolved = resolve(config, source)
    if memory_bytes is None:
        return Prepared(config, resolved, device_memory(resolved.device))
    if wanted != "cpu":
        resolved = dataclasses.replace(resolved, device="cuda")
        config = config.on_gpu(memory_bytes)
    return Prepared(config, resolved, DeviceMemory(total=memory_bytes, available=memory_bytes))


def read_config(name: str) -> dict[str, object]:
    """name: a directory, a config.json, or a known model. Raises `ConfigError` or `CheckpointError`."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    return read_json(path) if path.is_file() else known_config(name)


def _ledger(prepared: Prepared) -> Ledger:
    config, resolved, memory = prepared.config, prepared.resolved, prepared.memory
    parts, footprint = parts_of(config, resolved), prepared.footprint
    ranks = zip(parts, footprint.ranks or (footprint,), strict=True)
    columns = [_column(resolved, part, each) for part, each in ranks]
    spec, parallel, gpu = resolved.spec, config.parallel, resolved.device == "cuda"
    lines = [
        f"{config.model.model or 'the built-in model'}: {spec.architecture}, {spec.num_layers} layers, "
        f"{spec.num_parameters():,} parameters; computes in {resolved.dtype}, KV in "
        f"{resolved.kv_cache_dtype}",
        f"ranks: {parallel.world_size} (tensor parallel {parallel.tensor_parallel_size}, pipeline parallel "
        f"{parallel.pipeline_parallel_size}), replicas: {parallel.data_parallel_size}; "
        f"{format_bytes(memory.total)} of memory on each {'GPU' if gpu else 'machine'}",
        "",
        *_table(columns),
        "",
    ]
    try:
        found = prepared.memory_plan()
    except MemoryFitError as error:
        return Ledger(tuple(lines), error)
    lines.append(
        f"KV cache: {found.num_blocks - 1:,} blocks of {found.block_size} tokens, "
        f"{format_bytes(found.kv_bytes)} in all; holds {found.kv_tokens:,} tokens, "
        f"{found.full_length_sequences:,.1f} sequences of {found.max_model_len:,}"
    )
    return Ledger(tuple(lines), None)


def _column(resolved: ResolvedModel, part: WorkerSpec, footprint: Footprint) -> dict[str, str]:
    """One rank's numbers, by name."""
    spec, size = part.model, element_bytes(resolved.dtype)
    kinds = weight_kinds(part, footprint, size)
    heads = spec.heads
    kv = spec.kv_bytes_per_token(element_bytes(part.kv_cache_dtype))
    kv += 0 if part.draft is None else part.draft.slot_bytes
    return {
        "layers": f"{len(spec.own_layers)}",
        "query heads, KV heads": f"{heads.num_heads}, {heads.num_kv_heads}",
        "weights": format_bytes(footprint.weight_bytes),
        **{f"  {kind}": format_bytes(count) for kind, count in kinds.items() if count},
        "activations (largest step)": format_bytes(footprint.step_bytes),
        "KV of one token": format_bytes(kv),
    }


def weight_kinds(part: WorkerSpec, footprint: Footprint, dtype_bytes: int) -> dict[str, int]:
    """Bytes of a rank's weights, by kind. They add up to `footprint.weight_bytes`."""
    spec = part.model
    kinds = dict.fromkeys(("attention", "MLP", "embedding and head", "norms"), 0)
    for linear in spec.linears():
        kinds[_kind(linear)] += spec.quantization.weight_bytes(linear, dtype_bytes)
    others = spec.weight_bytes(dtype_bytes) - sum(kinds.values())
    norms = spec.norm_parameters() * dtype_bytes
    kinds["norms"], kinds["embedding and head"] = (
        norms,
        kinds["embedding and head"] + others - norms,
    )
    kinds["draft model"] = 0 if part.draft is None else part.draft.weight_bytes
    kinds["rotary tables"] = footprint.weight_bytes - sum(kinds.values())
    return kinds


def _kind(linear: LinearShape) -> str:
    name = linear.parts[0].name
    if ".self_attn." in name:
        return "attention"
    return "MLP" if ".mlp." in name else "embedding and head"


def _table(columns: Sequence[dict[str, str]]) -> list[str]:
    """A row for each name, and a column for each run of ranks that are alike."""
    heads, alike = [], []
    for column, run in itertools.groupby(enumerate(columns), key=lambda pair: pair[1]):
        ranks = [rank for rank, _ in run]
        heads.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
        alike.append(column)
    names = list(dict.fromkeys(name for column in alike for name in column))
    width = max(map(len, names))
    rows = [("", heads), *((name, [column.get(name, "-") for column in alike]) for name in names)]
    return [f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows]

"""From MODEL, a GPU and a layout to memory (that of `quire serve --dry-run`) and the terms of a step."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quire.builtin import MODEL_DIR
from quire.config import from_flat
from quire.dtypes import element_bytes
from quire.engine.assemble import parts_of
from quire.engine.dry_run import ConfigOnly, Prepared, prepare, read_config, weight_kinds
from quire.engine.memory import MemoryPlan, kv_budget
from quire.errors import ConfigError, UnsupportedModelError
from quire.models.known import known_config, known_names
from quire.plan.devices import Gpu
from quire.plan.roofline import BOUND, DENSE, Efficiency, Experts, Roofline, Shape
from quire.runner.footprint import Footprint, WorkerSpec, block_bytes
from quire.weights.resolve import find_local, resolve_config
from quire.weights.source import open_source

MIXTURES = Path(__file__).with_name("mixtures.json")
"""Public mixtures of experts, as `quire.models.known` has dense models."""
STORED: Mapping[str, dict[str, object]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
}  # fmt: skip
"""The usual checkpoints of a model in these formats. They leave head and embedding in 16 bits."""
ONLINE = ("int8", "int4", "fp8_per_channel")
QUANTIZATIONS = (*STORED, *ONLINE)
_DENSE = {"MixtralForCausalLM": "MistralForCausalLM", "Qwen3MoeForCausalLM": "Qwen3ForCausalLM"}
_EXPERT_FIELDS = frozenset(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step "
    "mlp_only_layers norm_topk_prob output_router_logits router_aux_loss_coef router_jitter_noise".split()
)


@dataclass(frozen=True, slots=True)
class Model:
    """A model's config, and how many experts it has."""

    name: str
    fields: Mapping[str, object]
    experts: Experts = DENSE


@dataclass(frozen=True, slots=True)
class Layout:
    """How one replica is placed."""

    gpu: Gpu
    tensor_parallel: int = 1
    quantization: str | None = None
    """One of `QUANTIZATIONS`; None: as the checkpoint is."""

    @property
    def label(self) -> str:
        form = self.quantization or "as it is"
        return f"{self.gpu.name} tp {self.tensor_parallel}, {form}"


def find_model(name: str | None) -> Model:
    """name: a directory, a config.json, a known model, or a hub id, of which only config.json is fetched;
    None: the built-in model.

    Raises `ConfigError`, `CheckpointError` or `UnsupportedModelError`.
    """
    if name is None:
        name = str(MODEL_DIR)
    key, mixtures = name.rpartition("/")[2].lower(), json.loads(MIXTURES.read_text("utf-8"))
    path = Path(name).expanduser()
    if path.exists():
        fields = open_source(path).config() if path.suffix == ".gguf" else read_config(name)
    elif key in mixtures:
        fields = dict(mixtures[key])
    elif key in known_names():
        fields = known_config(key)
    elif "/" in name and not name.startswith(("/", ".", "~")):
        local = find_local(name)
        fields = open_source(local).config() if local else read_config(str(resolve_config(name)))
    else:
        names = [*known_names(), *mixtures]
        close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
        raise ConfigError(
            f"model {name!r} is neither a directory, nor a config.json, nor a hub id (owner/name), nor a "
            f"known model; try {' or '.join(close) or ', '.join(names)}."
        )
    return _dense(name, fields)


def _dense(name: str, fields: Mapping[str, object]) -> Model:
    """A mixture of experts is sized as a dense model whose MLPs are all experts', side by side. Its routers,
    less than 0.1 % of the weights, do not count."""
    architectures = fields.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    if architecture not in _DENSE:
        return Model(name, fields)
    count = fields.get("num_local_experts") or fields.get("num_experts")
    size = fields.get("moe_intermediate_size") or fields.get("intermediate_size")
    chosen = fields.get("num_experts_per_tok", 2)
    uneven = fields.get("decoder_sparse_step", 1) != 1 or bool(fields.get("mlp_only_layers"))
    if uneven or not (isinstance(count, int) and isinstance(size, int) and isinstance(chosen, int)):
        raise UnsupportedModelError(
            f"config.json: {architecture} with fields of experts that plan does not know; it "
            "plans mixtures in which every layer has the same experts."
        )
    kept = {key: value for key, value in fields.items() if key not in _EXPERT_FIELDS}
    kept |= {"architectures": [_DENSE[architecture]], "intermediate_size": count * size}
    kept["model_type"] = {"mixtral": "mistral", "qwen3_moe": "qwen3"}.get(
        str(fields.get("model_type")), fields.get("model_type")
    )
    return Model(name, kept, Experts(count, chosen))


@dataclass(frozen=True)
class Sized:
    """A model in a layout. `memory` raises `MemoryFitError` if it does not fit."""

    model: Model
    layout: Layout
    prepared: Prepared
    options: Mapping[str, object]
    """Of the engine, by flat name."""

    @property
    def dry_run(self) -> list[str]:
        """The words after `quire serve --dry-run` that print the same memory."""
        words = [
            "--hf-config",
            self.model.name,
            "--device-memory",
            str(self.layout.gpu.memory_bytes),
        ]
        for name, value in self.options.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        return words

    @cached_property
    def parts(self) -> list[WorkerSpec]:
        return parts_of(self.prepared.config, self.prepared.resolved)

    @cached_property
    def rank(self) -> Footprint:
        """Of the first rank, which has the most."""
        return (self.prepared.footprint.ranks or (self.prepared.footprint,))[0]

    @cached_property
    def kinds(self) -> dict[str, int]:
        return weight_kinds(self.parts[0], self.rank, element_bytes(self.prepared.resolved.dtype))

    @cached_property
    def memory(self) -> MemoryPlan:
        return self.prepared.memory_plan()

    @cached_property
    def shape(self) -> Shape:
        part = self.parts[0]
        return Shape.of(
            part.model, dtype=part.dtype, kv_dtype=part.kv_cache_dtype, experts=self.model.experts
        )

    @property
    def kv_token_bytes(self) -> int:
        """On one rank."""
        part = self.parts[0]
        return part.model.kv_bytes_per_token(element_bytes(part.kv_cache_dtype))

    @property
    def kv_budget(self) -> int:
        """What weights and activations leave to the KV of one rank."""
        return kv_budget(self.prepared.config.cache, self.rank, gpu=True, replicas=1)

    @property
    def block_bytes(self) -> int:
        """Of one rank."""
        return block_bytes(self.prepared.config, self.parts[0])

    def blocks_for(self, num_tokens: int) -> int:
        config = self.prepared.config
        return self.prepared.resolved.spec.kv.blocks_for(
            num_tokens,
            config.cache.block_size,
            max_row_tokens=config.scheduler.max_num_batched_tokens,
        )

    def sequences(self, num_tokens: int) -> int:
        """How many requests of so many tokens the blocks hold, whatever `max_num_seqs` is. Raises
        `MemoryFitError` if not one of full length does."""
        if self.memory.full_length_sequences < 1:
            return 0
        return (self.kv_budget // self.block_bytes - 1) // self.blocks_for(num_tokens)

    def time(self, efficiency: Efficiency = BOUND) -> Roofline:
        form = self.layout.quantization or str(self.model.fields.get("quantization_config", ""))
        return Roofline(self.shape, self.layout.gpu, fp8="fp8" in form, efficiency=efficiency)


def place(model: Model, layout: Layout, options: Mapping[str, object]) -> Sized:
    """options: of the engine, by flat name. Raises `ConfigError` or `ModelError`."""
    form = layout.quantization
    if form is not None and form not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {form!r}.")
    values: dict[str, object] = {**options, "tensor_parallel_size": layout.tensor_parallel}
    if form is not None and form in STORED and not model.fields.get("quantization_config"):
        values["hf_overrides"] = {"quantization_config": STORED[form]}
    elif form is not None:
        values["quantization"] = form
    config = from_flat({**values, "model": model.name, "load_format": "dummy"})
    prepared = prepare(config, ConfigOnly(model.fields), memory_bytes=layout.gpu.memory_bytes)
    return Sized(model, layout, prepared, values)

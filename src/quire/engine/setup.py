"""From configuration and checkpoint to what each side needs. The front-end half never imports torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import EngineConfig, ModelConfig
from quire.engine.gpu import choose_device, gpu_memory
from quire.engine.memory import MemoryPlan, plan_memory
from quire.errors import CheckpointError, ConfigError, UnsupportedModelError
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.structured.spec import DEFAULT_LIMITS, Limits
from quire.weights.resolve import resolve_model

if TYPE_CHECKING:
    from quire.text.chat_template import ChatTemplate
    from quire.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DTYPE_NAMES = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}

SAMPLING_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
)  # fmt: skip
"""What generation_config.json may set for requests that do not say."""


@dataclass(frozen=True)
class ResolvedModel:
    """The model as files and numbers, before anything heavy is loaded."""

    model_dir: Path
    tokenizer_dir: Path
    spec: ModelSpec
    dtype: str
    """"bfloat16", "float16" or "float32"."""
    device: str
    """"cpu" or "cuda"."""
    kv_cache_dtype: str
    """As `dtype`, or "float8_e4m3fn"."""
    memory: MemoryPlan
    default_sampling: dict[str, object]
    eos_token_ids: tuple[int, ...]

    @property
    def max_model_len(self) -> int:
        return self.memory.max_model_len


@dataclass(frozen=True)
class ServedModel:
    """What request handling needs to know of the model."""

    names: tuple[str, ...]
    spec: ModelSpec
    max_model_len: int
    max_logprobs: int
    default_sampling: Mapping[str, object]
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    root: str
    grammars: Limits = DEFAULT_LIMITS
    """What grammars requests may bring."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size


def locate(config: EngineConfig) -> EngineConfig:
    """The same configuration with model and tokenizer as local directories, downloaded if need be."""
    model = config.model
    if model.model is None:
        from quire.builtin import MODEL_DIR, MODEL_NAME

        names = model.served_model_name or (MODEL_NAME,)
        located = dataclasses.replace(model, model=str(MODEL_DIR), served_model_name=names)
    else:
        options = {
            "revision": model.revision,
            "download_dir": model.download_dir,
            "hf_token": model.hf_token,
        }
        directory = resolve_model(model.model, **options)
        tokenizer = None
        if model.tokenizer is not None:
            tokenizer = str(resolve_model_files(model.tokenizer, **options))
        located = dataclasses.replace(
            model,
            model=str(directory),
            tokenizer=tokenizer,
            served_model_name=model.served_model_name or (model.model,),
        )
    return dataclasses.replace(config, model=located)


def resolve_model_files(name: str, **options: str | None) -> Path:
    """A tokenizer's directory: any local directory will do, with or without a config.json."""
    path = Path(name).expanduser()
    return path if path.is_dir() else resolve_model(name, **options)


def resolve(config: EngineConfig) -> ResolvedModel:
    """Read the model's configs and settle everything that follows from them. `config` is located."""
    model = config.model
    assert model.model is not None, "locate() first"
    directory = Path(model.model)
    hf_config = _read_json(directory / "config.json")
    for key, value in model.hf_overrides.items():
        hf_config[key] = value
    spec = resolve_spec(hf_config)
    dtype = spec.checkpoint_dtype if model.dtype == "auto" else DTYPE_NAMES[model.dtype]
    generation = _generation_config(model, directory)
    ends: object = spec.eos_token_ids
    for source in (generation, model.override_generation_config):
        if source.get("eos_token_id") is not None:
            ends = source["eos_token_id"]
    device = choose_device(config.runtime.device)
    kv_cache_dtype = dtype if config.cache.kv_cache_dtype == "auto" else "float8_e4m3fn"
    if kv_cache_dtype != dtype and device == "cpu":
        raise ConfigError("kv_cache_dtype 'fp8' needs a GPU; on the CPU leave it at auto.")
    memory = plan_memory(
        config,
        spec,
        dtype_bytes=DTYPE_BYTES[dtype],
        kv_dtype_bytes=DTYPE_BYTES[kv_cache_dtype],
        max_model_len=_wanted_model_len(model, spec),
        machine=gpu_memory() if device == "cuda" else None,
        gpu=device == "cuda",
    )
    scheduler = config.scheduler
    if (
        not scheduler.enable_chunked_prefill
        and scheduler.max_num_batched_tokens < memory.max_model_len
    ):
        raise ConfigError(
            f"without chunked prefill a whole prompt must fit a step: max_num_batched_tokens "
            f"({scheduler.max_num_batched_tokens}) is less than max_model_len "
            f"({memory.max_model_len}). Raise the first, lower the second, or leave chunking on."
        )
    return ResolvedModel(
        model_dir=directory,
        tokenizer_dir=Path(model.tokenizer) if model.tokenizer else directory,
        spec=spec,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        memory=memory,
        default_sampling=_sampling_defaults(model, generation),
        eos_token_ids=_token_ids(ends),
    )


def serve_model(config: EngineConfig, resolved: ResolvedModel) -> ServedModel:
    """Load tokenizer and chat template."""
    from quire.text.chat_template import ChatTemplate, read_chat_template
    from quire.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(resolved.tokenizer_dir)
    source, tool_source = tokenizer.chat_template, tokenizer.tool_chat_template
    if config.model.chat_template is not None:
        source, tool_source = read_chat_template(config.model.chat_template), None
    template = None
    if source is not None:
        template = ChatTemplate.for_tokenizer(
            source,
            tokenizer,
            tool_source=tool_source,
            content_format=config.model.chat_template_content_format,  # type: ignore[arg-type]
        )
    eos = resolved.eos_token_ids
    if not eos and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    return ServedModel(
        names=config.model.served_model_name,
        spec=resolved.spec,
        max_model_len=resolved.max_model_len,
        max_logprobs=config.model.max_logprobs,
        default_sampling=resolved.default_sampling,
        eos_token_ids=eos,
        tokenizer=tokenizer,
        chat_template=template,
        root=str(resolved.model_dir),
        grammars=Limits(config.structured.max_grammar_bytes, config.structured.json_whitespace),
    )


def _wanted_model_len(model: ModelConfig, spec: ModelSpec) -> int | None:
    wanted = model.max_model_len
    if wanted is None:
        return spec.max_position_embeddings
    if wanted == -1:
        return None
    if wanted < 1:
        raise ConfigError(f"max_model_len must be positive, -1 or auto, got {wanted}.")
    if wanted > spec.max_position_embeddings and spec.rope.type != "dynamic":
        raise ConfigError(
            f"max_model_len {wanted} exceeds the {spec.max_position_embeddings} positions the model "
            "was made for. Lower it, or extend the model with --hf-overrides "
            '\'{"rope_scaling": {...}, "max_position_embeddings": ...}\'.'
        )
    return wanted


def _generation_config(model: ModelConfig, directory: Path) -> dict[str, object]:
    if model.generation_config not in ("auto", "vllm"):
        directory = Path(model.generation_config)
        if not (directory / "generation_config.json").is_file():
            raise ConfigError(f"generation_config: no generation_config.json in {directory}.")
    path = directory / "generation_config.json"
    return _read_json(path) if path.is_file() else {}


def _sampling_defaults(model: ModelConfig, generation: Mapping[str, object]) -> dict[str, object]:
    source = {} if model.generation_config == "vllm" else dict(generation)
    source |= model.override_generation_config
    defaults = {name: source[name] for name in SAMPLING_DEFAULTS if source.get(name) is not None}
    if "max_new_tokens" in defaults:
        defaults["max_tokens"] = defaults.pop("max_new_tokens")
    if source.get("do_sample") is False and "temperature" not in model.override_generation_config:
        # transformers ignores the sampling fields then.
        defaults = {k: v for k, v in defaults.items() if k in ("repetition_penalty", "max_tokens")}
        if model.generation_config != "vllm":
            defaults["temperature"] = 0.0
    return defaults


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
        return tuple(value)
    raise UnsupportedModelError(
        f"generation_config.json: eos_token_id must be a token id or a list of them, got {value!r}"
    )


def _read_json(path: Path) -> dict[str, object]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return loaded

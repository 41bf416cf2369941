"""From configuration and checkpoint to the models of front end and core. It never imports torch."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import EngineConfig, KVTransfer, ModelConfig
from quire.dtypes import FLOAT_SPELLINGS, FLOATS
from quire.engine.drafts import locate_draft, resolve_draft
from quire.engine.end_tokens import EndTokens, EosSource, end_tokens
from quire.engine.generation_config import (
    OVERRIDE,
    eos_sources,
    read_generation_config,
    sampling_defaults,
)
from quire.engine.gpu import choose_device, gpu_memory
from quire.errors import CheckpointError, ConfigError
from quire.models.fields import QUANTIZATION_FIELDS
from quire.models.registry import resolve_spec, text_config
from quire.models.spec import ModelSpec
from quire.quantization import choose_method
from quire.speculative.spec import DraftSpec, HeadDraftSpec
from quire.structured.base import DEFAULT_LIMITS, Limits
from quire.weights.resolve import resolve_model, resolve_tokenizer
from quire.weights.source import FILES, ModelSource, TensorInfo, open_source

if TYPE_CHECKING:
    from quire.text.chat_template import ChatTemplate
    from quire.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
    max_model_len: int
    """The most tokens of a request: the option's, or the model's context. With -1 the engine core reduces
    it to what its memory holds (`EngineReady.max_model_len`)."""
    default_sampling: dict[str, object]
    eos_sources: tuple[EosSource, ...]
    """The end tokens in the configs; `read_tokens` joins them with the tokenizer's."""
    warnings: tuple[str, ...]
    """For the operator: values of the model's files that were dropped."""
    draft: DraftSpec | HeadDraftSpec | None = None
    """The model of speculative decoding, if its method has one."""


@dataclass(frozen=True)
class ServedModel:
    """The facts about the model that request handling needs."""

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
    """Limits for the grammars of requests."""
    max_drafts: int = 0
    """The most drafts of a step; 0 without speculative decoding."""
    kv_transfer: KVTransfer | None = None
    """How KV is exchanged with other instances, if it is."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size


def locate(config: EngineConfig) -> EngineConfig:
    """The same configuration with model and tokenizer as local directories, downloaded if need be, and the
    defaults of this machine's device."""
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
            tokenizer = str(resolve_tokenizer(model.tokenizer, **options))
        located = dataclasses.replace(
            model,
            model=str(directory),
            tokenizer=tokenizer,
            served_model_name=model.served_model_name or _names(model.model),
        )
    config = dataclasses.replace(config, model=located, speculative=locate_draft(config))
    memory = gpu_memory() if choose_device(config.runtime.device) == "cuda" else None
    return config if memory is None else config.on_gpu(memory.total)


def _names(model: str) -> tuple[str, ...]:
    """Under which a model is served if no option says it: as the user wrote it, and before that a local file
    by its name without the suffix."""
    path = Path(model).expanduser()
    return (path.stem, model) if path.suffix in FILES and path.is_file() else (model,)


def resolve(config: EngineConfig, source: ModelSource | None = None) -> ResolvedModel:
    """Read the model's configs and derive everything that follows from them. `config` comes from `locate`.
    source: instead of the model's files."""
    model = config.model
    assert model.model is not None, "locate() first"
    directory = Path(model.model)
    source = source or open_source(directory)
    hf_config = text_config(source.config() | model.hf_overrides)
    spec, stored_dtype = _as_stored(_resolve_spec(hf_config, model), model, source)
    dtype = stored_dtype if model.dtype == "auto" else FLOAT_SPELLINGS[model.dtype]
    generation = read_generation_config(model, source)
    default_sampling, warnings = sampling_defaults(model, generation)
    device = choose_device(config.runtime.device)
    kv_cache_dtype = dtype if config.cache.kv_cache_dtype == "auto" else "float8_e4m3fn"
    resolved = ResolvedModel(
        model_dir=directory,
        tokenizer_dir=Path(model.tokenizer) if model.tokenizer else directory,
        spec=spec,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=_wanted_model_len(model, spec),
        default_sampling=default_sampling,
        eos_sources=eos_sources(model, hf_config, generation),
        warnings=tuple(warnings),
    )
    draft = resolve_draft(config, resolved, resolve)
    return resolved if draft is None else dataclasses.replace(resolved, draft=draft)


def read_tokens(resolved: ResolvedModel) -> tuple[Tokenizer, EndTokens]:
    """Load the tokenizer, and derive the end tokens."""
    tokenizer = open_source(resolved.tokenizer_dir).tokenizer()
    overridden = [source.file for source in resolved.eos_sources] == [OVERRIDE]
    ends = end_tokens(
        resolved.eos_sources,
        tokenizer,
        take_eos=not overridden,
        vocab_size=resolved.spec.vocab_size,
        default=resolved.spec.default_eos_token_ids,
    )
    return tokenizer, ends


def serve_model(config: EngineConfig, resolved: ResolvedModel) -> ServedModel:
    """Load tokenizer and chat template, and log the values of the model's files that were dropped."""
    from quire.text.chat_template import ChatTemplate, read_chat_template

    tokenizer, ends = read_tokens(resolved)
    for warning in (*resolved.warnings, *ends.warnings):
        logger.warning(warning)
    if tokenizer.max_token_id >= resolved.spec.vocab_size:
        logger.warning(
            "the tokenizer has token ids up to %d, but config.json's vocab_size is %d: prompts with a "
            "greater id are refused",
            tokenizer.max_token_id, resolved.spec.vocab_size,
        )  # fmt: skip
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
        logger.debug("messages are rewritten for the chat template: %s", template.facts.describe())
    return ServedModel(
        names=config.model.served_model_name,
        spec=resolved.spec,
        max_model_len=resolved.max_model_len,
        max_logprobs=config.model.max_logprobs,
        default_sampling=resolved.default_sampling,
        eos_token_ids=ends.ids,
        tokenizer=tokenizer,
        chat_template=template,
        root=str(resolved.model_dir),
        grammars=Limits(config.structured.max_grammar_bytes, config.structured.json_whitespace),
        max_drafts=config.max_drafts,
        kv_transfer=config.kv_transfer.transfer,
    )


def _resolve_spec(hf_config: Mapping[str, object], model: ModelConfig) -> ModelSpec:
    """As the checkpoint and `--quantization` say it."""
    found = [(name, hf_config[name]) for name in QUANTIZATION_FIELDS if hf_config.get(name)]
    quantization: Mapping[str, object] = {}
    for name, config in found[:1]:
        if isinstance(config, dict):
            hidden = {"tensors"} if model.load_format == "dummy" else set()
            quantization = {key: value for key, value in config.items() if key not in hidden}
            hf_config = {**hf_config, name: quantization}
    spec = resolve_spec(hf_config)
    method = choose_method(model.quantization, quantization, spec.quantization)
    return dataclasses.replace(spec, quantization=method)


def _as_stored(spec: ModelSpec, model: ModelConfig, source: ModelSource) -> tuple[ModelSpec, str]:
    """The spec and dtype, completed from the weights' files: the dtype, and whether there is a head. Base
    models (Qwen3-Embedding-8B) are saved without a head; their hidden states do not need it."""
    tensors = {} if model.load_format == "dummy" else _headers(source)
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    if not spec.tie_word_embeddings and not has_head and "embed_tokens.weight" in tensors:
        logger.info(
            "the checkpoint has no output head: it serves embeddings, and generates no text"
        )
        # Tied, so that the unused head takes no memory.
        spec = dataclasses.replace(spec, tie_word_embeddings=True, has_head=False)
    stored = (info.dtype for info in tensors.values() if info.dtype in FLOATS)
    return spec, spec.checkpoint_dtype or next(stored, "float32")


def _headers(source: ModelSource) -> Mapping[str, TensorInfo]:
    """Empty if they cannot be read, which loading will report."""
    try:
        with source.open() as checkpoint:
            return checkpoint.tensors
    except CheckpointError:
        return {}


def _wanted_model_len(model: ModelConfig, spec: ModelSpec) -> int:
    wanted = model.max_model_len
    if wanted is None or wanted == -1:
        return spec.context_length
    if wanted < 1:
        raise ConfigError(f"max_model_len must be positive, -1 or auto, got {wanted}.")
    stretches = any(rope.type == "dynamic" for rope in spec.ropes)
    if wanted > spec.context_length and not stretches:
        raise ConfigError(
            f"max_model_len {wanted} exceeds the {spec.context_length} positions the model was made for "
            f"({spec.context_source} in config.json). Lower it, or extend the model with --hf-overrides "
            '\'{"rope_scaling": {...}, "max_position_embeddings": ...}\'.'
        )
    return wanted

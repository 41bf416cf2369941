"""The draft model or head of a configuration: where it is, what it is, whether it fits the target. Without
torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from quire.config import EngineConfig, ModelConfig, Speculation, SpeculativeConfig
from quire.errors import ConfigError, UnsupportedModelError
from quire.models.head_spec import resolve_head
from quire.models.spec import ModelSpec
from quire.speculative.spec import DraftSpec, HeadDraftSpec
from quire.weights.resolve import resolve_model
from quire.weights.source import open_source

MODEL_METHODS = ("draft_model",)
"""Methods whose draft is a model of its own."""
HEAD_METHODS = ("eagle", "eagle3", "mtp")
"""Methods whose draft is a head that reads the target's hidden states."""


class Resolved(Protocol):
    """`quire.engine.setup.ResolvedModel`."""

    @property
    def model_dir(self) -> Path: ...
    @property
    def tokenizer_dir(self) -> Path: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...


def locate_draft(config: EngineConfig) -> SpeculativeConfig:
    """The same options with the draft as a local directory or file, downloaded if need be. The built-in
    model has a built-in draft."""
    speculation = config.speculative.speculation
    if speculation is None or speculation.method not in (*MODEL_METHODS, *HEAD_METHODS):
        return config.speculative
    options = config.model
    if speculation.method == "mtp":
        if speculation.model not in (None, options.model):
            raise ConfigError(
                f"speculative_config model is {speculation.model!r}, but method mtp uses layers of the model "
                "itself; leave it out, or use eagle3 or draft_model."
            )
        return config.speculative
    if speculation.model is not None:
        directory = resolve_model(
            speculation.model,
            revision=speculation.revision,
            download_dir=options.download_dir,
            hf_token=options.hf_token,
        )
    elif options.model is None and speculation.method in MODEL_METHODS:
        from quire.builtin import DRAFT_DIR as directory
    else:
        raise ConfigError(
            f"speculative_config: method {speculation.method} needs a model: a directory, GGUF file or hub "
            "id. Only the built-in model has a built-in draft."
        )
    values = dataclasses.asdict(dataclasses.replace(speculation, model=str(directory)))
    return SpeculativeConfig(speculative_config=values)


def resolve_draft(
    config: EngineConfig, target: Resolved, resolve: Callable[[EngineConfig], Resolved]
) -> DraftSpec | HeadDraftSpec | None:
    """None for methods without a model. `config` comes from `locate`. resolve: `quire.engine.setup.resolve`.

    Raises `ConfigError` if the draft does not fit the target, `CheckpointError` or `UnsupportedModelError`
    as for any model.
    """
    speculation = config.speculative.speculation
    if speculation is None or speculation.method not in (*MODEL_METHODS, *HEAD_METHODS):
        return None
    if target.device != "cpu":
        raise ConfigError(
            f"speculative_config: method {speculation.method} drafts on the CPU only so far; on a GPU use "
            "ngram or suffix."
        )
    if target.spec.kv.windows[0] is not None:
        raise ConfigError(
            f"speculative_config: every layer of the model keeps only {target.spec.kv.windows[0]} "
            f"tokens, and method {speculation.method} needs the blocks of all; use ngram or suffix."
        )
    if speculation.method in HEAD_METHODS:
        return _resolve_head(speculation, target)
    assert speculation.model is not None, "locate() first"
    own = config.model
    draft = resolve(
        EngineConfig(
            model=ModelConfig(
                model=speculation.model,
                dtype=own.dtype,
                quantization=speculation.quantization,
                load_format=own.load_format,
                generation_config="vllm",
            ),
            runtime=config.runtime,
        )
    )
    _check_vocabulary(target.tokenizer_dir, draft.tokenizer_dir)
    return DraftSpec(
        model=dataclasses.replace(draft.spec, keeps_all=True),
        directory=draft.model_dir,
        dtype=draft.dtype,
        max_model_len=_positions(speculation, draft, target.max_model_len),
    )


def _resolve_head(speculation: Speculation, target: Resolved) -> HeadDraftSpec:
    if speculation.quantization is not None:
        raise ConfigError(
            f"speculative_config quantization is {speculation.quantization!r}, but heads are computed as "
            "they are stored; leave it out."
        )
    directory = target.model_dir if speculation.model is None else Path(speculation.model)
    try:
        head = resolve_head(
            speculation.method, open_source(directory), target.spec, open_source(target.model_dir)
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"speculative_config, {directory}: {error}") from error
    longest = min(speculation.max_model_len or target.max_model_len, target.max_model_len)
    return HeadDraftSpec(head=head, directory=directory, dtype=target.dtype, max_model_len=longest)


def _positions(speculation: Speculation, draft: Resolved, wanted: int) -> int:
    limit = draft.max_model_len
    if speculation.max_model_len is not None:
        if speculation.max_model_len > limit:
            raise ConfigError(
                f"speculative_config: max_model_len {speculation.max_model_len} exceeds the draft model's "
                f"{limit} positions."
            )
        limit = speculation.max_model_len
    return min(limit, wanted)


@lru_cache(maxsize=8)
def _check_vocabulary(target: Path, draft: Path) -> None:
    """Added tokens may differ: they are few, and a wrong draft costs time only."""
    if _same_file(target, draft):
        return
    of_target, of_draft = (
        open_source(path).tokenizer().backend.get_vocab(with_added_tokens=False)
        for path in (target, draft)
    )
    if of_target == of_draft:
        return
    differ = sorted(of_target.items() ^ of_draft.items(), key=lambda item: (item[1], item[0]))
    shown = ", ".join(f"{token!r} is {number}" for token, number in differ[:4])
    raise ConfigError(
        f"speculative_config: the draft model {draft} has another vocabulary ({len(of_draft):,} tokens) than "
        f"the model ({len(of_target):,}): {len(differ):,} entries differ, such as {shown}. Choose a draft of "
        "the same family, or use suffix."
    )


def _same_file(target: Path, draft: Path) -> bool:
    """Whether both have the same tokenizer.json: then nothing need be parsed."""
    files = [path / "tokenizer.json" for path in (target, draft)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()

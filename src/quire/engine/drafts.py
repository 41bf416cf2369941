"""The draft model of a configuration: where it is, what it is, whether it fits the target. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from quire.config import EngineConfig, ModelConfig, Speculation, SpeculativeConfig
from quire.errors import ConfigError
from quire.models.spec import ModelSpec
from quire.speculative.spec import DraftSpec
from quire.weights.resolve import resolve_model
from quire.weights.source import open_source

MODEL_METHODS = ("draft_model",)
"""Methods whose draft is a model of its own."""


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
    if speculation is None or speculation.method not in MODEL_METHODS:
        return config.speculative
    options = config.model
    if speculation.model is not None:
        directory = resolve_model(
            speculation.model,
            revision=speculation.revision,
            download_dir=options.download_dir,
            hf_token=options.hf_token,
        )
    elif options.model is None:
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
) -> DraftSpec | None:
    """None for methods without a model. `config` comes from `locate`. resolve: `quire.engine.setup.resolve`.

    Raises `ConfigError` if the draft does not fit the target, `CheckpointError` or `UnsupportedModelError`
    as for any model.
    """
    speculation = config.speculative.speculation
    if speculation is None or speculation.method not in MODEL_METHODS:
        return None
    assert speculation.model is not None, "locate() first"
    if target.device != "cpu":
        raise ConfigError(
            "speculative_config: method draft_model drafts on the CPU only so far; on a GPU use ngram or "
            "suffix."
        )
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
    if target.spec.kv.windows[0] is not None:
        raise ConfigError(
            f"speculative_config: every layer of the model keeps only {target.spec.kv.windows[0]} "
            "tokens, and a draft model needs the blocks of all; use ngram or suffix."
        )
    _check_vocabulary(target.tokenizer_dir, draft.tokenizer_dir)
    return DraftSpec(
        model=dataclasses.replace(draft.spec, keeps_all=True),
        directory=draft.model_dir,
        dtype=draft.dtype,
        max_model_len=_positions(speculation, draft, target.max_model_len),
    )


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

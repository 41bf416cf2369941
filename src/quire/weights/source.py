"""The protocol of model sources: how a model's config, tokenizer and tensors are read from its files. No
source imports torch.

A source returns the contents of Hugging Face's layout: a config with the fields of config.json, and
tensors under the names in a checkpoint of that architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A header's entry for one tensor."""

    name: str
    """Its name in the file, for messages. `Checkpoint.tensors` may have it under another name."""
    file: str
    shape: tuple[int, ...]
    dtype: str
    """The name in `quire.dtypes`, or the file's own name if it is not there. If PyTorch does not have the
    dtype, rows are loaded as bytes."""
    begin: int
    """Offset of its first byte in the file. The rest follows row by row."""
    num_bytes: int

    @property
    def position(self) -> tuple[str, int]:
        """Its position among all tensors."""
        return self.file, self.begin


class Checkpoint(Protocol):
    """An open source: headers read and checked, data not touched. A context manager."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `begin` on: whole rows. Called from several threads.

        Raises `CheckpointError` when the disk fails or the file has become shorter.
        """

    def check_unchanged(self) -> None:
        """Call after the last `read`. Raises `CheckpointError` if a file was written to in the meantime:
        the tensors may then be from two models."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class ModelSource(Protocol):
    """Each method raises `CheckpointError`, naming the file, where it is missing or damaged."""

    def config(self) -> dict[str, object]: ...

    def generation_config(self) -> dict[str, object]:
        """Empty where there is none."""

    def tokenizer(self) -> Tokenizer:
        """With its chat template."""

    def open(self) -> Checkpoint:
        """Read and check the headers of all tensors."""


FILES: dict[str, str] = {".gguf": "quire.weights.gguf"}
"""Suffix of a file that is a whole model -> the module with its `Source`. A directory has Hugging Face's
layout."""


def open_source(path: Path) -> ModelSource:
    """path: as `quire.weights.resolve.find_local` and `resolve_model` give it."""
    module = "quire.weights.safetensors" if path.is_dir() else FILES[path.suffix]
    source: ModelSource = importlib.import_module(module).Source(path)
    return source

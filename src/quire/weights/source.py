"""The family of places a model comes from: how its config, tokenizer and tensors are read, whatever files
they are in. No member imports torch.

A member gives what Hugging Face's layout would: a config with the fields of config.json, and tensors under
the names that a checkpoint of that architecture has.
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
    """What a header says of one tensor."""

    name: str
    """In the file, for messages. `Checkpoint.tensors` may know it by another."""
    file: str
    shape: tuple[int, ...]
    dtype: str
    """By the names of `quire.dtypes`; the file's own where it is not there. Rows of one that PyTorch lacks
    are loaded as bytes."""
    begin: int
    """Of its first byte in the file. The rest follows row by row."""
    num_bytes: int

    @property
    def position(self) -> tuple[str, int]:
        """Where it lies among all."""
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
        """Call after the last `read`. Raises `CheckpointError` if somebody wrote to a file meanwhile: what
        was read may then be part one model and part another."""

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


FILES: dict[str, str] = {}
"""How the name of a file that is a whole model ends -> the module that has its `Source`. A directory is in
Hugging Face's layout."""


def open_source(path: Path) -> ModelSource:
    """path: as `quire.weights.resolve.find_local` and `resolve_model` give it."""
    module = "quire.weights.safetensors" if path.is_dir() else FILES[path.suffix]
    source: ModelSource = importlib.import_module(module).Source(path)
    return source

"""Checkpoints without tokenizer.json: transformers converts the tokenizer files that they have.

transformers 5 builds a `tokenizers.Tokenizer` from sentencepiece, tiktoken and vocab/merges files. We use
only that backend, so that such a checkpoint is then handled like any other. This is the only place in
`quire.text` that imports transformers (2 s, and it imports torch). It is used only when there is no
tokenizer.json, and never runs code from the model's directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

CONVERTIBLE_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)


def convertible_file(directory: Path) -> str | None:
    """The name of a tokenizer file that transformers may be able to convert, or None."""
    return next((name for name in CONVERTIBLE_FILES if (directory / name).is_file()), None)


def convert_with_transformers(directory: Path, *, found: str) -> Backend:
    """A backend built by transformers from `found` and its neighbours.

    Raises `CheckpointError` where transformers is missing, refuses, or has only a tokenizer
    written in Python for this model.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{directory} has {found} but no tokenizer.json, and transformers, which could "
            "convert it, is not installed. Install transformers, or add a tokenizer.json."
        ) from error
    from tokenizers import Tokenizer as Backend

    try:
        converted = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # any library may be missing for any old format
        raise CheckpointError(
            f"transformers could not load the tokenizer in {directory} ({found}); it may need "
            "sentencepiece or tiktoken, or code that we never run from a model's directory. Save "
            "it once with AutoTokenizer.save_pretrained() and use the tokenizer.json it writes."
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise CheckpointError(
            f"The tokenizer in {directory} ({found}) exists only as Python code in transformers; "
            "a tokenizer.json is needed to serve it."
        )
    return backend

"""The request that all datasets give, and the reading of their files."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from quire.bench.options import DatasetOptions
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.text import Tokenizer


class DatasetError(ConfigError):
    """A dataset's file cannot be read or has no usable request. Names the file and the place."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt. `token_ids`: the tokens of `text`, special tokens included."""

    text: str
    token_ids: list[int]
    output_len: int
    due: float | None = None
    """Seconds from the start, if the dataset has times."""

    @property
    def prompt_len(self) -> int:
        return len(self.token_ids)


Reader = Callable[[DatasetOptions, "Tokenizer"], list[BenchRequest]]

_READERS = {
    "sharegpt": "quire.bench.datasets.sharegpt:read",
    "sharegpt-synthetic": "quire.bench.datasets.sharegpt:generate",
    "random": "quire.bench.datasets.synthetic:random_tokens",
    "prefix_repetition": "quire.bench.datasets.synthetic:prefix_repetition",
    "custom": "quire.bench.datasets.files:custom",
    "timed_trace": "quire.bench.datasets.files:timed_trace",
}


def load_requests(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """At most `num_prompts` requests, the same for the same options, file and tokenizer.

    Raises `DatasetError` for a file that is missing, malformed or empty.
    """
    if options.dataset_name not in _READERS:
        raise DatasetError(
            f"dataset_name {options.dataset_name} is sessions of several turns, which only "
            "`quire bench serve` can send."
        )
    module, _, name = _READERS[options.dataset_name].partition(":")
    reader = cast(Reader, getattr(importlib.import_module(module), name))
    requests = reader(options, tokenizer)
    if not requests:
        raise DatasetError(
            f"{options.dataset_path or options.dataset_name} has no request that passes the filters."
        )
    return requests


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DatasetError(
            f"dataset_path {path} cannot be read: {error.strerror or error}."
        ) from None
    except UnicodeDecodeError:
        raise DatasetError(f"dataset_path {path} is not UTF-8 text.") from None


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number (from 1) and object of each line that is not blank."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path} line {number} is not JSON: {error}.") from None
        if not isinstance(entry, dict):
            raise DatasetError(f"{path} line {number} must be a JSON object.")
        yield number, entry


def sampled(options: DatasetOptions, requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    """`num_prompts` entries: if there are fewer, they repeat, unless `no_oversample` is set."""
    chosen = list(requests[: options.num_prompts])
    missing = options.num_prompts - len(chosen)
    if missing > 0 and chosen and not options.no_oversample:
        chosen += random.Random(options.seed).choices(chosen, k=missing)
    return chosen

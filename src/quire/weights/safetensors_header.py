"""The header of a safetensors file: its tensors, their shapes and their byte ranges.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length,
little-endian; that many bytes of JSON; then the tensors' bytes, without gaps. Quire reads it without the
library, which only returns mapped memory. The pages of a mapped file count as the process's memory until
it is closed, which doubles the peak while loading; and if the file shrinks or a read fails, the process
is killed with SIGBUS, where `pread` returns an error that can be reported.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import BinaryIO

from quire.dtypes import BY_SAFETENSORS, DTYPES

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""The library's own limit: a file with a longer header is not a safetensors file."""


class HeaderError(Exception):
    """Not a safetensors file, or an incomplete one. The message is for a developer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one file."""

    shape: tuple[int, ...]
    dtype: str
    """The name in `quire.dtypes`, or safetensors' own name if it is not there."""
    begin: int
    """Offset of its first byte in the file; the rest follows row by row."""
    num_bytes: int


def read_header(
    file: BinaryIO, file_bytes: int, most_bytes: int = MOST_HEADER_BYTES
) -> dict[str, Entry]:
    """All tensors, by name. The file's length must match its tensors exactly. most_bytes: of the header.

    Raises `HeaderError`; `OSError` comes through.
    """
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if file_bytes < LENGTH_BYTES or length > min(most_bytes, file_bytes - LENGTH_BYTES):
        raise HeaderError(f"a header of {length} bytes does not fit")
    try:
        fields = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise HeaderError("the header is not an object")
    fields.pop("__metadata__", None)
    data = LENGTH_BYTES + length
    entries = {name: _entry(name, value, data) for name, value in fields.items()}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        if entry.begin != end:
            raise HeaderError(f"{name} begins at {entry.begin}, not where the last one ends, {end}")
        end += entry.num_bytes
    if end != file_bytes:
        raise HeaderError(f"the tensors end at {end}, the file at {file_bytes}")
    return entries


def _entry(name: str, value: object, data: int) -> Entry:
    if not isinstance(value, dict):
        raise HeaderError(f"{name} is {value!r}")
    dtype = value.get("dtype")
    shape, span = _sizes(name, value.get("shape")), _sizes(name, value.get("data_offsets"))
    if not isinstance(dtype, str) or len(span) != 2 or span[0] > span[1]:
        raise HeaderError(f"{name} is {value!r}")
    num_bytes = span[1] - span[0]
    dtype = BY_SAFETENSORS.get(dtype, dtype)
    # The size of an unknown type is taken as stated: it cannot be loaded anyway.
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].bits != num_bytes * 8:
        raise HeaderError(f"{name}, {dtype} {shape}, does not take {num_bytes} bytes")
    return Entry(shape, dtype, data + span[0], num_bytes)


def _sizes(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise HeaderError(f"{name} has {value!r} for a list of sizes")
    return tuple(value)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields

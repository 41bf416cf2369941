"""The header of a GGUF file, of version 2 or 3: metadata, tensors, shapes and byte ranges.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts, pairs of
key and value, one entry for each tensor; then the tensors' bytes, aligned. All is little-endian.

Nothing in the file is trusted. A length or count is compared with the bytes that are left before anything of
that size is made, so that time and memory are bounded by the size of the file and by `MOST_HEADER_BYTES`.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from quire.quantization.gguf_types import BLOCKS

MAGIC = b"GGUF"
MOST_HEADER_BYTES = 256 << 20
"""The largest vocabularies and their merges take 20 MB."""
READ_BYTES = 1 << 20
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

TYPE_NAMES: Mapping[int, str] = {
    0: "float32", 1: "float16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1",
    10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K", 16: "iq2_xxs",
    17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs",
    24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 29: "iq1_m", 30: "bfloat16",
    34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4",
}  # fmt: skip
"""ggml's number of a type -> the name in `BLOCKS`."""

STRING, ARRAY = 8, 9
SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""The file's number of a value's type -> its code in `struct` and `array`."""


class HeaderError(Exception):
    """Not a GGUF file that can be read. The message ends a sentence that names the file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one file."""

    shape: tuple[int, ...]
    """Outputs first, as in PyTorch. (The file lists dimensions in the other order.)"""
    type: str
    """A name in `BLOCKS`."""
    begin: int
    """Offset of its first byte in the file."""
    num_bytes: int


class Strings(Sequence[str]):
    """An array of strings. They are decoded when they are needed: reading a config needs none."""

    def __init__(self, data: bytes, ends: array[int]) -> None:
        self._data = data
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]
        begin = (self._ends[index - 1] if index % len(self) else 0) + 8
        return self._data[begin:end].decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Header:
    metadata: Mapping[str, object]
    """A value is an int, float, bool, str, an `array` of numbers, or `Strings`."""
    tensors: Mapping[str, Entry]


def read_header(file: BinaryIO, file_bytes: int) -> Header:
    """Raises `HeaderError`; `OSError` comes through."""
    cursor = _Cursor(file, file_bytes)
    if file_bytes < 24 or cursor.take(4) != MAGIC:
        raise HeaderError("does not begin like a GGUF file; download it again")
    version = cursor.scalar("I")
    if version not in (2, 3):
        what = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
        raise HeaderError(f"is {what}; only little-endian GGUF of version 2 and 3 is read")
    num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.require(num_tensors * 24 + num_pairs * 13, "its counts of tensors and keys")
    metadata: dict[str, object] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        if key in metadata:
            raise HeaderError(f"has the key {key!r:.80} twice")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise HeaderError(f"has general.alignment {alignment!r:.80}, which is no power of two")
    entries = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in entries:
            raise HeaderError(f"has the tensor {name!r:.80} twice")
        entries[name] = _entry(cursor, name, alignment)
    data = -(-cursor.position // alignment) * alignment
    return Header(metadata, _placed(entries, data, file_bytes))


class _Cursor:
    """Reads the file's beginning, as far as it is asked for."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        file.seek(0)
        self._file = file
        self._limit = min(file_bytes, MOST_HEADER_BYTES)
        self._data = b""
        self.position = 0

    def require(self, count: int, what: str) -> None:
        if count > self._limit - self.position:
            raise HeaderError(f"is too short for {what}; it is truncated: download it again")

    def fill(self, count: int) -> None:
        """Have `count` bytes from `position` on in `_data`."""
        missing = self.position + count - len(self._data)
        if missing <= 0:
            return
        self.require(count, f"{count} bytes at {self.position}")
        wanted = min(max(missing, READ_BYTES, len(self._data)), self._limit - len(self._data))
        more = self._file.read(wanted)
        if len(more) < missing:
            raise HeaderError("ends in its header; it is truncated: download it again")
        self._data += more

    def take(self, count: int) -> bytes:
        self.fill(count)
        begin = self.position
        self.position += count
        return self._data[begin : self.position]

    def scalar(self, code: str):  # type: ignore[no-untyped-def]
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise HeaderError(f"has a text at {self.position} that is not UTF-8") from None

    def strings(self, count: int) -> Strings:
        """`count` strings, each after its length."""
        self.require(8 * count, f"an array of {count} texts")
        begin, ends = self.position, array("Q", [0]) * count
        unpack, position = struct.Struct("<Q").unpack_from, begin
        for index in range(count):
            if position + 8 > len(self._data):
                self.position = position
                self.fill(8)
            position += 8 + unpack(self._data, position)[0]
            if position > self._limit:
                raise HeaderError(f"ends in an array of {count} texts; download it again")
            ends[index] = position - begin
        self.position = begin
        return Strings(self.take(position - begin), ends)


def _value(cursor: _Cursor, key: str) -> object:
    kind = cursor.scalar("I")
    if kind == STRING:
        return cursor.string()
    if kind != ARRAY:
        return cursor.scalar(_scalar_code(kind, key))
    kind, count = cursor.scalar("I"), cursor.scalar("Q")
    if kind == STRING:
        return cursor.strings(count)
    code = _scalar_code(kind, key)
    size = struct.calcsize("<" + code)
    cursor.require(count * size, f"an array of {count} values in {key}")
    values = array("B" if code == "?" else code)
    values.frombytes(cursor.take(count * size))
    return values


def _scalar_code(kind: int, key: str) -> str:
    if kind not in SCALARS:
        what = "an array of arrays" if kind == ARRAY else f"a value of unknown type {kind}"
        raise HeaderError(f"has {what} in {key!r:.80}")
    return SCALARS[kind]


def _entry(cursor: _Cursor, name: str, alignment: int) -> Entry:
    """Its `begin` counts from the beginning of the data."""

    def fail(what: str) -> NoReturn:
        raise HeaderError(f"has the tensor {name!r:.80} with {what}")

    num_dimensions = cursor.scalar("I")
    if not 1 <= num_dimensions <= MOST_DIMENSIONS:
        fail(f"{num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    if number not in TYPE_NAMES:
        fail(f"type {number}, which is not known")
    block = BLOCKS[TYPE_NAMES[number]]
    if 0 in shape or math.prod(shape) > 1 << 62:
        fail(f"dimensions {list(shape)}")
    if shape[0] % block.elements:
        fail(
            f"rows of {shape[0]} values, no multiple of the {block.elements} of {TYPE_NAMES[number]}"
        )
    if offset % alignment:
        fail(f"offset {offset}, no multiple of the alignment {alignment}")
    num_bytes = math.prod(shape) // block.elements * block.bytes
    return Entry(shape[::-1], TYPE_NAMES[number], offset, num_bytes)


def _placed(entries: Mapping[str, Entry], data: int, file_bytes: int) -> dict[str, Entry]:
    """With `begin` in the file. Raises `HeaderError` where bytes are missing or belong to two tensors."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin < end:
            raise HeaderError(f"has the tensor {name!r:.80} in another one's bytes")
        end = entry.begin + entry.num_bytes
        if data + end > file_bytes:
            raise HeaderError(
                f"has {file_bytes} bytes, but its tensor {name!r:.80} ends at {data + end}; it is "
                "truncated: download it again"
            )
    return {
        name: Entry(entry.shape, entry.type, data + entry.begin, entry.num_bytes)
        for name, entry in entries.items()
    }

"""A model in one GGUF file, or in shards X-00001-of-00003.gguf: config, tokenizer and tensors.

Only what `quire.weights.gguf_header` and `quire.weights.gguf_config` understand is read. Tensors are given as
those of a checkpoint in Hugging Face's layout: rows that llama.cpp's converter has permuted are put back in
their order as they are read, which works on the bytes of quantized rows as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quire.dtypes import FLOATS
from quire.errors import CheckpointError
from quire.quantization.gguf_types import BLOCKS
from quire.weights.gguf_config import family_of, hf_name, read_config
from quire.weights.gguf_files import SHARD
from quire.weights.gguf_header import Entry, Header, HeaderError, read_header
from quire.weights.open_files import FileStatus, OpenFiles, unreadable
from quire.weights.source import TensorInfo

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

MOST_ROPE_BYTES = 1 << 16

Headers = dict[str, tuple[FileStatus, Header]]
"""By the names of the files."""


class Source:
    """`ModelSource` of a .gguf file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._headers: Headers = {}

    def config(self) -> dict[str, object]:
        with self.open() as checkpoint:
            return checkpoint.config()

    def generation_config(self) -> dict[str, object]:
        from quire.text.gguf_tokenizer import read_generation_config

        with self.open() as checkpoint:
            return read_generation_config(checkpoint.metadata)

    def tokenizer(self) -> Tokenizer:
        from quire.text.gguf_tokenizer import read_tokenizer

        with self.open() as checkpoint:
            return read_tokenizer(checkpoint.metadata, where=self._path.name)

    def open(self) -> GgufCheckpoint:
        return GgufCheckpoint(self._path, self._headers)


class GgufCheckpoint(OpenFiles):
    """All files of the model, open. `tensors` has Hugging Face's names."""

    def __init__(self, path: Path, headers: Headers) -> None:
        """headers: those that are known; a new one is added."""
        super().__init__()
        self._entries: dict[str, Entry] = {}
        self._file_of: dict[str, str] = {}
        try:
            shards = [self._header(shard, headers) for shard in _shards(path)]
            self.metadata = shards[0].metadata
            _check_shards(path, shards, num_tensors=len(self._entries))
            self._family = family_of(self.metadata)
            self._config = read_config(self.metadata, self._entries, self._floats)
            self._permuted: set[str] = set()
            for name in self._entries:
                self._add(name)
        except BaseException:
            self.close()
            raise

    def config(self) -> dict[str, object]:
        """As in config.json. `quantization_config` has the types of all tensors."""
        types = {name: (info.dtype, info.shape) for name, info in self.tensors.items()}
        if all(info.dtype in FLOATS for info in self.tensors.values()):
            return self._config
        quantization = {"quant_method": "gguf", "tensors": types}
        return {**self._config, "quantization_config": quantization}

    def read(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        if info.name in self._permuted:
            self._read_permuted(info, begin, into)
        else:
            super().read(info, begin, into)
        if self._family.norms_plus_one and info.name.endswith("norm.weight"):
            values = np.frombuffer(into, dtype=np.float32)
            values -= 1.0

    def _read_permuted(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        """Whole heads are read, and the wanted rows taken from them."""
        head: int = self._config["head_dim"]  # type: ignore[assignment]
        row = info.num_bytes // info.shape[0]
        first, end = begin // row, (begin + len(into)) // row
        start, stop = first // head * head, -(-end // head) * head
        stored = np.empty((stop - start) * row, dtype=np.uint8)
        super().read(info, start * row, memoryview(stored))  # type: ignore[arg-type]
        rows = stored.reshape(-1, head // 2, 2, row).swapaxes(1, 2).reshape(-1, row)
        np.frombuffer(into, dtype=np.uint8)[:] = rows[first - start : end - start].ravel()

    def _header(self, path: Path, headers: Headers) -> Header:
        try:
            handle, status = self.add_file(path)
            known = headers.get(path.name)
            if known is None or known[0] != status:
                known = headers[path.name] = (status, read_header(handle, status.num_bytes))
        except OSError as error:
            raise unreadable(path, error) from error
        except HeaderError as error:
            raise CheckpointError(f"{path} {error}") from None
        for name, entry in known[1].tensors.items():
            if name in self._entries:
                raise CheckpointError(f"tensor {name!r:.80} is in two shards of {path}")
            self._entries[name], self._file_of[name] = entry, path.name
        return known[1]

    def _floats(self, name: str) -> list[float]:
        """The values of a small tensor of float32."""
        entry = self._entries[name]
        if entry.type != "float32" or entry.num_bytes > MOST_ROPE_BYTES:
            raise CheckpointError(f"tensor {name} is {entry.type} {list(entry.shape)}")
        into = bytearray(entry.num_bytes)
        super().read(self._info(name), 0, memoryview(into))
        return np.frombuffer(into, dtype=np.float32).tolist()

    def _info(self, name: str) -> TensorInfo:
        entry = self._entries[name]
        shape = entry.shape
        if entry.type not in FLOATS:
            *outer, width = shape
            block = BLOCKS[entry.type]
            shape = (*outer, width // block.elements * block.bytes)
        file = self._file_of[name]
        return TensorInfo(name, file, shape, entry.type, entry.begin, entry.num_bytes)

    def _add(self, name: str) -> None:
        target = hf_name(self._family, name)
        if target is None:
            return
        info = self._info(name)
        part = name.split(".")[-2] if "." in name else ""
        if self._family.norms_plus_one and part.endswith("norm") and info.dtype != "float32":
            raise CheckpointError(f"tensor {name} is {info.dtype}, but norms must be float32")
        if self._family.permuted and part in ("attn_q", "attn_k"):
            head_dim: int = self._config["head_dim"]  # type: ignore[assignment]
            if info.shape[0] % head_dim:
                raise CheckpointError(
                    f"tensor {name} has {info.shape[0]} rows, for heads of {head_dim}"
                )
            self._permuted.add(name)
        if target in self.tensors:
            raise CheckpointError(
                f"tensors {self.tensors[target].name} and {name} are both {target}"
            )
        self.tensors[target] = info


def _shards(path: Path) -> list[Path]:
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]


def _check_shards(path: Path, shards: Sequence[Header], *, num_tensors: int) -> None:
    count = shards[0].metadata.get("split.count") or 1
    total = shards[0].metadata.get("split.tensors.count", num_tensors)
    numbers = [shard.metadata.get("split.no", 0) for shard in shards]
    if count != len(shards) or total != num_tensors or numbers != list(range(len(shards))):
        raise CheckpointError(
            f"{path} says that it is one of {count} shards with {total} tensors, and the files beside it are "
            f"{len(shards)} with {num_tensors}; download all of them, and keep their names"
        )

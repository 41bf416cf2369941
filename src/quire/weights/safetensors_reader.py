"""Reading safetensors checkpoints: checked before the first byte is used, then read piece by piece.

safetensors only. A `.bin` file is a pickle, and loading one runs whatever its author put in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from quire.errors import CheckpointError
from quire.weights.files import INDEX_FILE, find_files, read_index
from quire.weights.safetensors_header import HeaderError, read_header

OPTIONAL_SUFFIXES = ("lm_head.weight", "rotary_emb.inv_freq")
"""An index may name these in vain: saving drops a tied head and a buffer, but not always their entries."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the file's header says of one tensor."""

    name: str
    """In the file; `Checkpoint.tensors` may know it by another."""
    file: str
    shape: tuple[int, ...]
    dtype: str
    """By the names of `quire.dtypes`; the file's own where it is not there."""
    begin: int
    """Of its first byte in the file."""
    num_bytes: int

    @property
    def position(self) -> tuple[str, int]:
        """Where it lies among all."""
        return self.file, self.begin


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    descriptor: int
    num_bytes: int
    changed: int
    """When its content last changed, in the file system's nanoseconds."""


class Checkpoint:
    """An open checkpoint: headers read and checked, data not touched. Use it as a context manager.

    Files are read, never mapped: see `quire.weights.safetensors_header` for why. `read` may be called
    from several threads.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._stack = ExitStack()
        self._files: dict[str, _File] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            index = read_index(model_dir)
            files = sorted(set(index.values())) if index is not None else find_files(model_dir)
            for file in files:
                self._open(file, index)
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    def _open(self, file: str, index: Mapping[str, str] | None) -> None:
        path = self._dir / file
        if not path.is_file():
            raise CheckpointError(
                f"{INDEX_FILE} names {file}, which is not in {self._dir}; download that shard again"
            )
        try:
            handle = self._stack.enter_context(path.open("rb"))
            status = os.fstat(handle.fileno())
            entries = read_header(handle, status.st_size)
        except OSError as error:
            raise _unreadable(path, error) from error
        except HeaderError as error:
            raise _corrupt(path) from error
        self._files[file] = _File(path, handle.fileno(), status.st_size, status.st_mtime_ns)
        for name, entry in entries.items():
            if index is not None and index.get(name) != file:
                continue
            if name in self.tensors:
                raise CheckpointError(
                    f"tensor {name} is in both {self.tensors[name].file} and {file} of {self._dir}; "
                    f"remove the file that does not belong, or add {INDEX_FILE}"
                )
            self.tensors[name] = TensorInfo(
                name, file, entry.shape, entry.dtype, entry.begin, entry.num_bytes
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            if name not in self.tensors and not name.endswith(OPTIONAL_SUFFIXES):
                raise CheckpointError(
                    f"{INDEX_FILE} places tensor {name} in {file}, which does not hold it; "
                    f"download {self._dir} again"
                )

    def read(self, name: str, begin: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `begin` on.

        Raises `CheckpointError` when the disk fails or the file has become shorter.
        """
        info = self.tensors[name]
        file = self._files[info.file]
        assert begin >= 0 and begin + len(into) <= info.num_bytes
        done = 0
        while done < len(into):
            try:
                count = os.preadv(file.descriptor, [into[done:]], info.begin + begin + done)
            except OSError as error:
                raise _unreadable(file.path, error) from error
            if count == 0:
                raise _corrupt(file.path)
            done += count

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor whole, in memory of its own."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        if tensor.numel():
            self.read(name, 0, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        return tensor

    def check_unchanged(self) -> None:
        """Call after the last `read`. Raises `CheckpointError` if somebody wrote to a file meanwhile: what
        was read may then be part one model and part another. (A file that was replaced, not
        overwritten, is still the old one for us.)
        """
        for file in self._files.values():
            status = os.fstat(file.descriptor)
            if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.changed):
                raise CheckpointError(
                    f"{file.path} was written to while it was loaded; start again when the download or "
                    "copy is complete"
                )

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _corrupt(path: Path) -> CheckpointError:
    size = path.stat().st_size if path.is_file() else 0
    return CheckpointError(
        f"{path} ({size} bytes) is not a complete safetensors file; it may be truncated or "
        "a Git LFS pointer: download it again"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}; check its permissions and the disk"
    )

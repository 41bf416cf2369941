"""The open files of a checkpoint, and reading from them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from quire.errors import CheckpointError
from quire.weights.source import TensorInfo


class FileStatus(NamedTuple):
    num_bytes: int
    changed: int
    """Time of the last change of its content, in the file system's nanoseconds."""


class _File(NamedTuple):
    path: Path
    descriptor: int
    status: FileStatus


class OpenFiles:
    """What checkpoints have in common.

    Files are read, never mapped: see `quire.weights.safetensors_header` for why. `read` may be called
    from several threads.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[str, _File] = {}
        self.tensors: dict[str, TensorInfo] = {}

    def add_file(self, path: Path) -> tuple[BinaryIO, FileStatus]:
        """Open a file of the checkpoint, known by its name from now on. Raises `OSError`."""
        handle = self._stack.enter_context(path.open("rb"))
        status = _status(handle.fileno())
        self._files[path.name] = _File(path, handle.fileno(), status)
        return handle, status

    def read(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        file = self._files[info.file]
        if begin < 0 or begin + len(into) > info.num_bytes:
            raise ValueError(
                f"bytes {begin} to {begin + len(into)} of {info.num_bytes} of a tensor"
            )
        done = 0
        while done < len(into):
            try:
                count = os.preadv(file.descriptor, [into[done:]], info.begin + begin + done)
            except OSError as error:
                raise unreadable(file.path, error) from error
            if count == 0:
                raise CheckpointError(
                    f"{file.path} has become shorter than it was; wait until the copy or download is "
                    "complete, or download it again"
                )
            done += count

    def check_unchanged(self) -> None:
        """If a file was replaced and not overwritten, the open file is still the old one."""
        for file in self._files.values():
            if _status(file.descriptor) != file.status:
                raise CheckpointError(
                    f"{file.path} was written to while it was loaded; start again when the download or "
                    "copy is complete"
                )

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _status(descriptor: int) -> FileStatus:
    status = os.fstat(descriptor)
    return FileStatus(status.st_size, status.st_mtime_ns)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}; check its permissions and the disk"
    )

"""The files of the disk tier: private, and never another user's, another model's or another process's.

    PATH/FINGERPRINT-SHARE.N/    0700; N is 0 unless another process uses that one
        lock                     held while a process uses the directory
        0000000001.kv            0600; a segment

No file is followed through a symbolic link, and only regular files of this user with one name are read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from quire.errors import ConfigError

MOST_PROCESSES = 64
"""That use one path with the same model."""
LEAST_BLOCKS = 16
"""A smaller tier is of no use."""

_DIRECTORY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}\.\d+")
_SEGMENT = re.compile(r"\d{10}\.kv")
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


class UnusableFileError(Exception):
    """It is not there, or it is not a file that this user's engine wrote."""


def check_disk(path: str | Path, size: int, block_bytes: int = 0) -> None:
    """Create the directory if it is not there. Raises `ConfigError` if it cannot be used, or has no room
    for `size` bytes."""
    path = Path(path).expanduser()
    named = f"--kv-disk-path {path}"
    if path.is_symlink():
        raise ConfigError(f"{named} is a symbolic link: name the directory that it points at.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if not path.is_dir():
            raise ConfigError(f"{named} is not a directory: name one that is, or a new one.")
        found = path.stat()
        space = os.statvfs(path)
        used = sum(map(_size_of, path.glob("*/*.kv")))
    except OSError as error:
        raise ConfigError(f"{named} cannot be used: {error}. Name another directory.") from None
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{named} belongs to user {found.st_uid}, and this process is user {os.geteuid()}:"
            " name a directory of its own."
        )
    if found.st_mode & 0o022:
        raise ConfigError(
            f"{named} can be written by other users, and KV contains prompts: chmod 700 {path}"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"{named} is not writable: chmod 700 {path}, or name another directory.")
    if size < LEAST_BLOCKS * block_bytes:
        least = LEAST_BLOCKS * block_bytes / 2**30
        raise ConfigError(
            f"--kv-disk-size: {size / 2**30:.3g} GiB for a rank are too small: at least {least:.3g}."
        )
    free = space.f_bavail * space.f_frsize + used
    if size > free:
        raise ConfigError(
            f"--kv-disk-size {size / 2**30:.3g} GiB is more than what {path} has room for,"
            f" {free / 2**30:.3g}: set a smaller size, or name another directory."
        )


class Directory:
    """A rank's own directory, locked until `close`. Files have names like "0000000001.kv", or
    "DIRECTORY/0000000001.kv" for those that others have left.

    Raises `ConfigError` if it cannot be opened.
    """

    def __init__(self, path: Path, fingerprint: bytes, share: str) -> None:
        lengths = f"{len(fingerprint)}/".encode()
        self.identity = hashlib.sha256(lengths + fingerprint + share.encode()).digest()
        whose = hashlib.sha256(fingerprint).hexdigest()[:16]
        base = f"{whose}-{hashlib.sha256(share.encode()).hexdigest()[:8]}"
        try:
            self._root = os.open(path, os.O_DIRECTORY | _OPEN)
            for number in range(MOST_PROCESSES):
                name = f"{base}.{number}"
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=self._root)
                opened = self._lock(name)
                if opened is not None:
                    self.name, self.path = name, path / name
                    self._fd, self._lock_fd = opened
                    return
        except (OSError, UnusableFileError) as error:
            raise ConfigError(
                f"--kv-disk-path {path} cannot be used: {error}. Delete it, or name another."
            ) from None
        raise ConfigError(
            f"--kv-disk-path {path} is used by {MOST_PROCESSES} engines: name another."
        )

    def close(self) -> None:
        for fd in (self._lock_fd, self._fd, self._root):
            os.close(fd)

    def segments(self) -> list[str]:
        """In ascending order of age."""
        return sorted(_names(self._fd), reverse=True)

    def others(self) -> Iterator[tuple[str, os.stat_result]]:
        """The segments in directories that no process uses now."""
        with os.scandir(self._root) as entries:
            names = [each.name for each in entries if _DIRECTORY.fullmatch(each.name)]
        for name in names:
            with self._locked(name) as fd:
                if fd is not None:
                    for file in _names(fd):
                        yield f"{name}/{file}", os.stat(file, dir_fd=fd, follow_symlinks=False)

    def open(self, file: str, flags: int = os.O_RDONLY) -> tuple[int, os.stat_result]:
        """A descriptor, and what it is. Raises `UnusableFileError`."""
        try:
            fd = os.open(file, flags | _OPEN | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
                raise UnusableFileError(f"{file}: {error.strerror}") from None
            raise
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and _is_private(found):
            return fd, found
        os.close(fd)
        raise UnusableFileError(f"{file} is not a private file of this user")

    def create(self, file: str) -> int:
        return os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _OPEN, 0o600, dir_fd=self._fd)

    def touch(self, file: str) -> None:
        """Note that it is used now."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, dir_fd=self._fd, follow_symlinks=False)

    def delete(self, file: str) -> None:
        folder, _, name = file.rpartition("/")
        with contextlib.suppress(FileNotFoundError), self._locked(folder) as fd:
            if fd is not None:
                os.unlink(name, dir_fd=fd)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int | None]:
        """A descriptor of a directory that nobody else uses; "" is this one."""
        if not name:
            yield self._fd
            return
        try:
            opened = self._lock(name)
        except (OSError, UnusableFileError):
            opened = None
        try:
            yield opened and opened[0]
        finally:
            for fd in opened or ():
                os.close(fd)

    def _lock(self, name: str) -> tuple[int, int] | None:
        """Descriptors of a directory and of its lock. None: a process uses it, this one included."""
        fd = os.open(name, os.O_DIRECTORY | _OPEN, dir_fd=self._root)
        try:
            if not _is_private(os.fstat(fd)):
                raise UnusableFileError(f"{name} in it is not a private directory of this user")
            lock = os.open("lock", os.O_CREAT | os.O_RDWR | _OPEN, 0o600, dir_fd=fd)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd, lock
            except OSError as error:
                os.close(lock)
                if error.errno != errno.EWOULDBLOCK:
                    raise
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None


def _size_of(file: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # another engine has just deleted it
        return file.lstat().st_size
    return 0


def _names(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [
            each.name
            for each in entries
            if _SEGMENT.fullmatch(each.name) and not each.is_dir(follow_symlinks=False)
        ]


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077

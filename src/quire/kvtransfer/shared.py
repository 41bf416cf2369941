"""KV between instances of one machine: a unix socket, over which a ticket's memory is passed as a descriptor.

The memory is a sealed memfd. It cannot shrink under its reader, and the reader cannot write to it. It has no
name and is gone with its last user, also after kill -9.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import stat
import struct
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quire.errors import ConfigError
from quire.kvtransfer.base import BlockBytes
from quire.kvtransfer.wire import PeerError

F_SEAL_FUTURE_WRITE = 0x10
"""Of linux/fcntl.h, since 5.1; Python has no name for it."""
MOST_PATH = 100
_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW")


class SharedMemory:
    """A ticket's memory that another process may read (`export.Memory`)."""

    def __init__(self, num_bytes: int) -> None:
        """Raises `OSError`."""
        self._lock = threading.Lock()
        self._descriptor: int | None = os.memfd_create(
            "quire-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            os.ftruncate(self._descriptor, max(num_bytes, 1))
            self._map = mmap.mmap(self._descriptor, max(num_bytes, 1))
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _seals() | F_SEAL_FUTURE_WRITE)
        except OSError:
            os.close(self._descriptor)
            raise

    def rows(self, count: int, size: int) -> list[BlockBytes]:
        return list(np.frombuffer(self._map, np.uint8, count * size).reshape(count, size))

    def duplicate(self) -> int | None:
        with self._lock:
            return None if self._descriptor is None else os.dup(self._descriptor)

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def open_memory(descriptor: int | None, rows: int, size: int) -> NDArray[np.uint8]:
    """The received memory, read-only: [rows, size]. Closes the descriptor. Raises `PeerError`, `OSError`."""
    if descriptor is None:
        raise PeerError("it has sent no memory")
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        has = os.fstat(descriptor).st_size
        if seals & _seals() != _seals() or has < rows * size:
            raise PeerError(f"its memory has {has} bytes, or is not sealed")
        mapped = mmap.mmap(descriptor, rows * size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8).reshape(rows, size)


def listen(path: str, number: int) -> socket.socket:
    """path: of sockets in a directory of this user's, which is made if need be. number: the rank's. Raises
    `ConfigError`."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"KV in shared memory needs Linux, this is {sys.platform}; use TCPConnector."
        )
    place = Path(f"{path}.{number}")
    if len(os.fsencode(place)) > MOST_PATH:
        raise ConfigError(
            f"The socket's path {place} is longer than {MOST_PATH} bytes; use a shorter one."
        )
    sock = socket.socket(socket.AF_UNIX)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = place.parent.stat()
        if there.st_uid != os.getuid() or there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"{place.parent} can be written by others; use a directory of your own."
            )
        with contextlib.suppress(FileNotFoundError):
            if _answers(place):
                raise ConfigError(f"Another process listens at {place}; use another path.")
            place.unlink()
        sock.bind(str(place))
        place.chmod(0o600)
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise ConfigError(f"Cannot listen at {place}: {error.strerror or error}.") from error
    except ConfigError:
        sock.close()
        raise
    return sock


def connect(path: str, number: int, timeout: float) -> socket.socket:
    """Raises `OSError`, `PeerError` if another user listens there."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(max(0.001, timeout))
        sock.connect(f"{path}.{number}")
        check_user(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def check_user(sock: socket.socket) -> None:
    """Raises `PeerError` if the other end is another user's."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.getuid():
        raise PeerError(f"it is user {user}, and this is user {os.getuid()}")


def _answers(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(place))
        except ConnectionRefusedError:
            return False
        return True


def _seals() -> int:
    return sum(getattr(fcntl, name) for name in _SEALS)

"""A rank's group as C programs see it: memory that all ranks share, or a call that gathers."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from ctypes import byref
from typing import NoReturn, Protocol

import torch

from quire.errors import WorkerError
from quire.kernels.cpu.library import GROUP_MESSAGE, GroupExchange, GroupWords, load_library
from quire.kernels.cpu.library import Group as NativeGroup
from quire.kernels.group import Group

FAILED, LATE = 32, 33
"""enum group_result in kernels.h."""
HEADER = ctypes.sizeof(GroupWords)


class CGroup(Protocol):
    """What a program needs of a group: the struct, and the error for what it returns. `SharedGroup` and
    `CalledGroup` are its members."""

    @property
    def native(self) -> NativeGroup:
        """Its address does not change. `data` and `bytes` are the area that all ranks share; a program places
        its buffers there at the same offsets at every rank, and writes a buffer again only after a
        barrier that follows the last read of it. If `data` is None the buffers are the rank's own."""
        ...

    def fail(self, code: int) -> NoReturn:
        """Raises the `WorkerError` of FAILED or LATE."""
        ...


def c_group(group: Group) -> CGroup:
    """The view of any group: its own if it shares memory, else one whose C function calls it."""
    own = getattr(group, "c_group", None)
    return CalledGroup(group) if own is None else own


class SharedGroup:
    """This process's view of the memory of a descriptor, as one rank. The memory is a file without a name:
    HEADER bytes, `reserved` bytes, and the data. It lasts until its last rank has closed it."""

    def __init__(
        self,
        descriptor: int,
        *,
        rank: int,
        size: int,
        timeout: float,
        reserved: int = 0,
        numbers: Sequence[int] | None = None,
        area: range | None = None,
    ) -> None:
        """timeout: seconds. numbers: of the ranks in errors, if not from 0. area: the bytes of the file that
        are this group's, from the start of a page; None: all. The descriptor may be closed afterwards.
        Raises `BuildError`, and `OSError` if the memory cannot be mapped."""
        self._lib = load_library()
        self._closing = threading.Lock()
        self._numbers = numbers or range(size)
        self.native = NativeGroup(rank=rank, size=size, timeout=timeout)
        own = range(os.fstat(descriptor).st_size) if area is None else area
        if code := self._lib.quire_group_open(
            byref(self.native), descriptor, own.start, len(own), reserved
        ):
            raise OSError(code, f"a group's shared memory: {os.strerror(code)}")
        between = (ctypes.c_uint8 * reserved).from_address(
            ctypes.addressof(self.native.words.contents) + HEADER
        )
        self.reserved = torch.frombuffer(between, dtype=torch.uint8) if reserved else torch.empty(0)
        """The bytes between header and data; empty after `close`."""

    def barrier(self) -> None:
        if code := self._lib.quire_group_barrier(byref(self.native)):
            self.fail(code)

    def post(self) -> None:
        """Count one more of this rank's."""
        if code := self._lib.quire_group_post(byref(self.native)):
            self.fail(code)

    def wait(self, rank: int, count: int) -> None:
        """Until the rank has posted so many times, modulo 2**32."""
        if code := self._lib.quire_group_wait(byref(self.native), rank, count % 2**32):
            self.fail(code)

    def fail(self, code: int) -> NoReturn:
        if not self.native.words:
            raise WorkerError("This rank's group is closed.")
        if code == LATE:
            late = self.native.late
            who = f"Rank {self._numbers[late]} (pid {self.native.words.contents.ranks[late].pid})"
            why = "has ended" if self.native.dead else f"is late by {self.native.timeout:g} s"
            self.abort(f"{who} {why}.")
        message = self.native.words.contents.message.decode(errors="replace")
        raise WorkerError(message or "A rank has failed.")

    def abort(self, message: str) -> None:
        """End every wait of every rank with this message; the first call's counts. From any thread, also
        after `close`, when it does nothing."""
        text = message.encode()[: GROUP_MESSAGE - 1]
        with self._closing:
            self._lib.quire_group_abort(byref(self.native), text)

    def close(self) -> None:
        """Idempotent. No other call but `abort` may be under way."""
        self.reserved = torch.empty(0)
        with self._closing:
            self._lib.quire_group_close(byref(self.native))


class CalledGroup:
    """A view of a group whose ranks share no memory: C calls its `gather` with the buffer."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._error: BaseException | None = None
        self._call = GroupExchange(self._exchange)
        self.native = NativeGroup(rank=group.rank, size=group.size, exchange=self._call)

    def _exchange(
        self, whole: int | None, rows: int, width: int, first: int, count: int, size: int
    ) -> int:
        try:
            if whole is None:
                self._group.barrier()
                return 0
            area = (ctypes.c_uint8 * (rows * width * size)).from_address(whole)
            buffer = torch.frombuffer(area, dtype=torch.uint8).view(rows, width * size)
            mine = buffer[:, first * size : (first + count) * size]
            buffer.copy_(self._group.gather(mine, first * size, width * size))
        except BaseException as error:  # ctypes would print it and go on
            self._error = error
            return 1
        return 0

    def fail(self, code: int) -> NoReturn:
        raise self._error or WorkerError("A rank has failed.")

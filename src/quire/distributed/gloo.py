"""Ranks on several machines, on CPUs: PyTorch's gloo, of which only the all-gather is used.

The process group is an object of its own, not PyTorch's global one, so that two engines can be in one
process. The ranks find each other through a store at rank 0, whose socket was bound before its port was
published: a port that is bound, closed and given away may be another program's by then.

gloo gathers pieces of equal size. So pieces are padded to a bound for each width, at first an equal share. A
piece carries its columns; if one is wider than the bound, all ranks see it, raise the bound to the widest,
and gather again.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work

from quire.errors import WorkerError

HEAD = 16
"""Bytes before a piece: its first byte in a row, and its number of bytes in a row, int64 each."""
SLICE_SECONDS = 0.1
"""Of a wait, which `abort` ends."""


class GlooGroup:
    """A `Group` over TCP. Nothing is authenticated: the network must be private."""

    def __init__(
        self,
        address: str,
        *,
        rank: int,
        size: int,
        timeout: float = 60.0,
        descriptor: int = -1,
        name: str = "",
    ) -> None:
        """address: HOST:PORT of the store, which groups of several names may share. descriptor: where the
        store is, the listening socket of that port, which is taken over. timeout: seconds to meet, and that
        a rank may be late. The ranks meet in the first call of another method, which raises `WorkerError` if
        they do not."""
        self.rank, self.size = rank, size
        self._address, self._name = address, name
        self._timeout = timedelta(seconds=timeout)
        self._group: ProcessGroupGloo | None = None
        self._bounds: dict[int, int] = {}
        self._failure = ""
        self._store = open_store(address, self._timeout, descriptor) if descriptor >= 0 else None

    def _met(self) -> ProcessGroupGloo:
        if self._group is not None:
            return self._group
        options = ProcessGroupGloo._Options()
        options._timeout = self._timeout
        options._threads = 1
        try:
            store = self._store or open_store(self._address, self._timeout)
            own = own_address(self._address.rpartition(":")[0])
            options._devices = [ProcessGroupGloo.create_device(hostname=own)]
            self._group = ProcessGroupGloo(
                PrefixStore(self._name, store), self.rank, self.size, options
            )
        except RuntimeError as error:
            seconds = self._timeout.total_seconds()
            self._failure = self._failure or (
                f"Rank {self.rank} did not meet the other ranks at {self._address} in {seconds:g} s: "
                f"{_reason(error)}."
            )
            raise WorkerError(self._failure) from error
        return self._group

    def gather(self, x: Tensor, first: int, width: int) -> Tensor:
        size, rows = x.element_size(), len(x)
        if not rows:
            return x.new_empty(0, width)
        row = width * size
        whole = torch.empty(rows, row, dtype=torch.uint8)
        place = 0
        for piece in self._pieces(x.contiguous().view(torch.uint8), first * size, row):
            begin, count = piece[:HEAD].view(torch.int64).tolist()
            if begin != place:
                break
            whole[:, begin : begin + count] = piece[HEAD:].view(rows, -1)[:, :count]
            place += count
        if place != row:
            raise WorkerError(
                f"The ranks' columns are not one whole: no rank begins at byte {place} of {row} of a "
                "row. All ranks must serve the same model."
            )
        return whole.view(x.dtype)

    def _pieces(self, mine: Tensor, first: int, row: int) -> list[Tensor]:
        """Of all ranks: HEAD, then [rows, bound]."""
        rows, count = mine.shape
        while True:
            bound = self._bounds.setdefault(row, -(-row // self.size))
            sent = torch.zeros(HEAD + rows * bound, dtype=torch.uint8)
            sent[:HEAD].view(torch.int64)[:] = torch.tensor([first, count])
            sent[HEAD:].view(rows, bound)[:, : min(count, bound)] = mine[:, :bound]
            pieces = [torch.empty_like(sent) for _ in range(self.size)]
            self._wait(lambda: self._met().allgather([pieces], [sent]))  # noqa: B023
            widest = max(int(piece[8:HEAD].view(torch.int64)) for piece in pieces)
            if widest <= bound:
                return pieces
            self._bounds[row] = widest

    def barrier(self) -> None:
        self._wait(lambda: self._met().barrier())

    def _wait(self, collective: Callable[[], Work]) -> None:
        try:
            work = None if self._failure else collective()
            while work is not None and not self._failure:
                try:
                    work.wait(timedelta(seconds=SLICE_SECONDS))
                    return
                except RuntimeError:
                    if work.is_completed():
                        raise
        except RuntimeError as error:
            # gloo does not say which rank: not in all cases, and never by its number.
            others = [str(rank) for rank in range(self.size) if rank != self.rank]
            who = f"Rank {others[0]}" if len(others) == 1 else f"One of ranks {', '.join(others)}"
            self._failure = self._failure or f"{who} has ended, or is late: {_reason(error)}."
        raise WorkerError(self._failure)

    def abort(self, message: str) -> None:
        """End every wait of this rank with a `WorkerError` of this message: for a watcher, from any
        thread. The first call's message counts. gloo's own wait goes on in its thread, to its timeout."""
        self._failure = self._failure or message

    def close(self) -> None:
        """Idempotent. After a failure, connections stay open until this object is gone: to close them is to
        wait for gloo's thread."""
        if not self._failure:
            self._failure = "This rank's group is closed."
            self._group = self._store = None


def open_store(address: str, timeout: timedelta, descriptor: int = -1) -> TCPStore:
    """The store at HOST:PORT. descriptor: the listening socket of that port, to serve it. Raises
    `RuntimeError`."""
    host, _, port = address.rpartition(":")
    serving = {"is_master": True, "master_listen_fd": descriptor} if descriptor >= 0 else {}
    return TCPStore(host, int(port), timeout=timeout, wait_for_workers=False, **serving)


def own_address(peer: str) -> str:
    """The address of this machine that reaches `peer`."""
    family, *_, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        return probe.getsockname()[0]


def _reason(error: Exception) -> str:
    """The first sentence of a message of gloo or the store, without the place in their source."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error)).split("\n")[0].partition(". ")[0]

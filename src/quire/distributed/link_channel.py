"""A channel between stages on different machines: `quire.kernels.group.Channel` over TCP.

The receiver listens, and publishes its address with a random token in the store of the ranks' groups; the
first connection that sends the token is the sender's. Frames are not protected: the network must be private.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import TCPStore

from quire.distributed.gloo import open_store, own_address
from quire.distributed.hello import keep_alive
from quire.distributed.links import Link, LinkError
from quire.errors import WorkerError

SLICE_SECONDS = 0.1
"""Of a wait, which `abort` ends."""
TOKEN_SECONDS = 5.0


class LinkChannel:
    """One end."""

    def __init__(
        self,
        address: str,
        *,
        sends: bool,
        slots: int,
        numbers: tuple[int, int],
        timeout: float = 60.0,
        descriptor: int = -1,
    ) -> None:
        """address: HOST:PORT of the store. descriptor: of its listening socket, if this rank serves it.
        numbers: of sender and receiver. timeout: seconds to meet, and that the other rank may be late.
        Raises `WorkerError`."""
        self._peer = f"rank {numbers[0 if not sends else 1]}"
        self._key = f"channel {numbers[0]}"
        self._timeout = timeout
        self._error: WorkerError | None = None
        self._link: Link | None = None
        self._listener: socket.socket | None = None
        self._queue: queue.Queue[bytes | None] = queue.Queue(slots)
        self._thread = threading.Thread(target=self._work, name="channel", daemon=True)
        with self._explained():
            self._store: TCPStore | None = open_store(
                address, timedelta(seconds=timeout), descriptor
            )
            if not sends:
                self._listen(own_address(address.rpartition(":")[0]))
        if sends:
            self._thread.start()

    def send(self, x: Tensor) -> None:
        data = bytes(x.contiguous().view(torch.uint8).flatten().numpy())
        until = time.monotonic() + self._timeout
        while True:
            if self._error is not None:
                raise self._error
            with contextlib.suppress(queue.Full):
                self._queue.put(data, timeout=SLICE_SECONDS)
                return
            if time.monotonic() > until:
                raise self._late()

    def receive(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        until = time.monotonic() + self._timeout
        if self._link is None:
            self._link = self._accepted(until)
        while (data := self._link.receive(timeout=SLICE_SECONDS)) is None:
            if self._error is not None:
                raise self._error
            if time.monotonic() > until:
                raise self._late()
        size = num_rows * width * dtype.itemsize
        if len(data) != size:
            raise WorkerError(f"{self._peer} sent {len(data)} bytes; the step has {size}.")
        return torch.frombuffer(bytearray(data), dtype=dtype).view(num_rows, width)

    def abort(self, message: str) -> None:
        self._error = self._error or WorkerError(message)

    def close(self) -> None:
        """What was sent may not have left."""
        self.abort("This rank's channel is closed.")
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join()
        for each in (self._link, self._listener):
            if each is not None:
                each.close()
        self._store = None

    def _listen(self, host: str) -> None:
        assert self._store is not None
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(SLICE_SECONDS)
        self._token = secrets.token_hex(16).encode()
        port = self._listener.getsockname()[1]
        self._store.set(self._key, f"{host} {port} {self._token.decode()}")

    def _accepted(self, until: float) -> Link:
        """The sender's connection."""
        assert self._listener is not None
        while True:
            if self._error is not None:
                raise self._error
            if time.monotonic() > until:
                raise self._late()
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                link = Link(sock, self._peer, timeout=self._timeout)
                with contextlib.suppress(LinkError):
                    if hmac.compare_digest(link.receive(timeout=TOKEN_SECONDS) or b"", self._token):
                        return link
                link.close()

    def _connected(self) -> Link:
        assert self._store is not None
        host, port, token = self._store.get(self._key).decode().split()
        sock = socket.create_connection((host, int(port)), timeout=self._timeout)
        keep_alive(sock)
        link = Link(sock, self._peer, timeout=self._timeout)
        link.send(token.encode())
        return link

    def _work(self) -> None:
        """Connect, and send what comes, so that a stage may run ahead of the next one."""
        try:
            with self._explained():
                self._link = self._connected()
            while (data := self._next()) is not None:
                self._link.send(data)
        except WorkerError as error:
            self._error = self._error or error

    def _next(self) -> bytes | None:
        while self._error is None:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=SLICE_SECONDS)
        return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            if isinstance(error, WorkerError):
                raise
            reason = str(error).split("\n")[0]
            raise WorkerError(f"There is no channel to {self._peer}: {reason}.") from error

    def _late(self) -> WorkerError:
        return WorkerError(f"{self._peer.capitalize()} is late by {self._timeout:g} s.")

"""Messages over a stream socket: a pair on one machine, TCP between machines. Never pickle.

A frame is a length of four bytes, little-endian, and so many bytes. Sockets do not block: a receiver first
tries for a moment, because the next plan usually follows at once, and then sleeps; a sender that finds no
room waits at most the link's timeout, so a peer that has stopped cannot stop this process too.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable

from quire.errors import WorkerError

MAX_BYTES = 256 << 20
SPIN_SECONDS = 50e-6
CHUNK = 1 << 16
_LENGTH = struct.Struct("<I")


class LinkError(WorkerError):
    """The peer has closed its end, does not read, or sends no frames."""


class Link:
    """One end. At most one thread sends and one receives."""

    def __init__(
        self, sock: socket.socket, peer: str, *, timeout: float = 60.0, max_bytes: int = MAX_BYTES
    ) -> None:
        """peer: names the other end in errors, like "rank 1 (pid 123)". timeout: seconds that `send` may
        wait for room. max_bytes: of a message; a longer one ends the link."""
        sock.setblocking(False)
        self.peer = peer
        self.max_bytes = max_bytes
        self.reads_ahead = True
        """False: nothing is received but the message that is asked for, so that `detach` loses nothing."""
        self._sock = sock
        self._timeout = timeout
        self._received = bytearray()
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        """For `select`; -1 after `close`. A complete message may already be buffered: `poll` until None
        before you wait on it."""
        return self._sock.fileno()

    def send(self, message: bytes) -> None:
        """Raises `LinkError`."""
        send_all((self,), message)

    def poll(self) -> bytes | None:
        """The next message if it has come. Raises `LinkError` once the peer has ended and all that it had
        sent is read."""
        while (message := self._taken()) is None:
            try:
                data = self._sock.recv(self._wanted())
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._error(f"failed: {error.strerror}") from error
            if not data:
                raise self._error("was closed by the other end")
            self._received += data
        return message

    def receive(self, *, timeout: float | None = None, spin: float = SPIN_SECONDS) -> bytes | None:
        """The next message; None if there is none after `timeout` seconds (None: without limit). Tries for
        `spin` seconds before it sleeps. Raises `LinkError`."""
        began = time.monotonic()
        waiter = None
        while (message := self.poll()) is None:
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                return None
            if waited >= spin:
                waiter = waiter or _waiter(self._sock, select.POLLIN)
                waiter.poll(None if timeout is None else 1000 * (timeout - waited) + 1)
        return message

    def close(self) -> None:
        """Idempotent. The peer reads what was sent, then the end."""
        self._sock.close()

    def detach(self) -> int:
        """The descriptor, for another process; this object is closed. See `reads_ahead`."""
        assert not self._received and not self._unsent
        return self._sock.detach()

    def _wanted(self) -> int:
        """Bytes to ask for."""
        missing = _LENGTH.size - len(self._received)  # of the length, then of the message
        if missing <= 0:
            missing += _LENGTH.unpack_from(self._received)[0]
        return min(max(CHUNK, missing), 16 * CHUNK) if self.reads_ahead else missing

    def _taken(self) -> bytes | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > self.max_bytes:
            raise self._error(f"has a message of {length} bytes, above {self.max_bytes}")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = bytes(memoryview(self._received)[_LENGTH.size : end])
        del self._received[:end]
        return message

    def _push(self) -> bool:
        """Send what there is room for. Returns whether nothing is left."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        except OSError as error:
            self._unsent = memoryview(b"")
            raise self._error(f"failed: {error.strerror}") from error
        return True

    def _finish(self) -> None:
        waiter = _waiter(self._sock, select.POLLOUT)
        while not self._push():
            if not waiter.poll(1000 * self._timeout):
                raise self._error(f"took no message for {self._timeout:g} s")

    def _error(self, what: str) -> LinkError:
        return LinkError(f"The link to {self.peer} {what}.")


def send_all(links: Iterable[Link], message: bytes) -> None:
    """The same message to each. One that does not read delays no other. Raises the first `LinkError`, after
    it has tried all of them."""
    links = tuple(links)
    frame = memoryview(_LENGTH.pack(len(message)) + message)
    errors: list[LinkError] = []
    slow: list[Link] = []
    for link in links:
        if len(message) > link.max_bytes:
            raise ValueError(f"a message of {len(message)} bytes is above {link.max_bytes}")
        link._unsent = frame
        try:
            if not link._push():
                slow.append(link)
        except LinkError as error:
            errors.append(error)
    for link in slow:
        try:
            link._finish()
        except LinkError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def pair(peer: str, *, timeout: float = 60.0) -> tuple[Link, socket.socket]:
    """A link, and the socket for a process to be started: `Link(socket.socket(fileno=n), ...)` there, with n
    from `pass_fds`. Close it here after the start."""
    ours, theirs = socket.socketpair()
    return Link(ours, peer, timeout=timeout), theirs


def _waiter(sock: socket.socket, event: int) -> select.poll:
    waiter = select.poll()
    waiter.register(sock, event)
    return waiter

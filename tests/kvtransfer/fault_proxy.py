"""A proxy between two instances that damages what they say."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TO_CLIENT, TO_SERVER = "to client", "to server"


@dataclass(frozen=True, slots=True)
class Fault:
    """of bytes: cut, flip, stall (`at`: the index of a byte); of messages with their lengths: drop, repeat,
    swap with the next one, grow, shrink (`at`: the index of the message)."""

    direction: str
    kind: str
    at: int


class FaultProxy:
    """Forwards each connection to the port of an instance. The fault happens on every connection."""

    def __init__(self, port: int, fault: Fault | None = None) -> None:
        self.fault = fault
        self.counts = {TO_CLIENT: 0, TO_SERVER: 0}
        """Bytes forwarded."""
        self.messages = {TO_CLIENT: 0, TO_SERVER: 0}
        self.num_connections = 0
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._start(self._accept)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def cut(self) -> None:
        """All connections."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, target, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            server = socket.create_connection(("127.0.0.1", self._to))
            self._sockets += [client, server]
            self._start(self._forward, server, client, TO_CLIENT)
            self._start(self._forward, client, server, TO_SERVER)

    def _forward(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        fault = self.fault if self.fault is not None and self.fault.direction == direction else None
        try:
            if fault is None or fault.kind in ("cut", "flip", "stall"):
                self._bytes(source, target, direction, fault)
            else:
                self._messages(source, target, direction, fault)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _bytes(
        self, source: socket.socket, target: socket.socket, direction: str, fault: Fault | None
    ) -> None:
        seen = 0
        while data := bytearray(source.recv(1 << 16)):
            here = -1 if fault is None else fault.at - seen
            if fault is not None and 0 <= here < len(data):
                if fault.kind == "cut":
                    target.sendall(data[:here])
                    return
                if fault.kind == "stall":
                    target.sendall(data[:here])
                    del data[:here]
                    self._sleep(1.0)
                else:
                    data[here] ^= 0x55
            seen += len(data)
            self.counts[direction] += len(data)
            target.sendall(data)

    def _messages(
        self, source: socket.socket, target: socket.socket, direction: str, fault: Fault
    ) -> None:
        kept = b""
        for index, message in enumerate(_read_messages(source)):
            self.messages[direction] += 1
            if index == fault.at:
                if fault.kind == "drop":
                    continue
                if fault.kind == "swap":
                    kept = message
                    continue
                if fault.kind == "grow":
                    message = struct.pack("<I", len(message) - 3) + message[4:] + b"\0"
                if fault.kind == "shrink":
                    message = struct.pack("<I", max(0, len(message) - 5)) + message[4:-1]
                if fault.kind == "repeat":
                    message += message
            target.sendall(message + kept)
            kept = b""

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._closed:
            time.sleep(0.01)


def _read_messages(source: socket.socket) -> Iterator[bytes]:
    while True:
        head = _exactly(source, 4)
        yield head + _exactly(source, struct.unpack("<I", head)[0])


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = source.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data


@contextmanager
def proxied(port: int, fault: Fault | None = None) -> Iterator[FaultProxy]:
    proxy = FaultProxy(port, fault)
    try:
        yield proxy
    finally:
        proxy.close()

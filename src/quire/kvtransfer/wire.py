"""The protocol between instances: who holds KV (the server) and who fetches it (the client).

    server -> client   MAGIC, nonce
    client -> server   MAGIC, nonce, HMAC-SHA256, `Reader`
    server -> client   HMAC-SHA256, `Holder` or `Refusal`

then from the client `Get`, `Renew` and `Release`, and from the server, for a `Get` only, a `Found` and
frames of blocks. Every message has its length before it, as on a `Link`. After the hello it begins with a
MAC over its number in its direction and its body, under a key of the connection: a message that was altered,
left out, repeated or moved ends the connection. Without a shared key the MAC is just a checksum. Nothing is
encrypted, so a network beyond one machine must be private.

A frame has whole blocks, in the order of the names, each as the layers and heads that were asked for. Both
sides know how many (`batches`). In shared memory there are no frames: `Found` comes with a descriptor.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from quire.distributed.hello import MAC, NONCE, proof
from quire.errors import QuireError
from quire.kvtransfer.share import KVShare

MAGIC = b"quire-kv 1\n"
"""With the version of the protocol and of the bytes of a block."""
KEY_VARIABLE = "QUIRE_KV_KEY"
SEAL = 16
"""Bytes of a message's MAC."""
HELLO_BYTES = 1 << 16
REQUEST_BYTES = 4 << 20
FRAME_BYTES = 512 << 10
"""Blocks are put into one frame up to this."""
MOST_BYTES = 1 << 30
"""Of a frame, so of a block."""
MOST_NAMES = 65_536
MOST_TICKETS = 4096
LENGTH = struct.Struct("<I")

_Text = Annotated[str, Meta(max_length=256)]
_Name = tuple[Annotated[bytes, Meta(max_length=64)], Annotated[int, Meta(ge=0)]]
_Index = Annotated[int, Meta(ge=0, le=1 << 20)]


class Reader(msgspec.Struct, tag="reader", frozen=True):
    """A rank of an instance that fetches KV."""

    engine_id: _Text
    rank: _Index
    ranks: Annotated[int, Meta(ge=1, le=4096)]
    """Of the instance."""
    fingerprint: Annotated[bytes, Meta(max_length=64)]
    """KV of another one is never moved."""


class Holder(msgspec.Struct, tag="holder", frozen=True):
    """A rank of an instance that holds KV."""

    engine_id: _Text
    share: KVShare


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    why: str


class Get(msgspec.Struct, tag="get", frozen=True):
    """Answered by `Found`, when the ticket's KV is complete."""

    ticket: _Text
    names: Annotated[list[_Name], Meta(max_length=MOST_NAMES)]
    layers: Annotated[list[_Index], Meta(max_length=4096)]
    heads: tuple[_Index, _Index]


class Renew(msgspec.Struct, tag="renew", frozen=True):
    """Holds these for one more lease. Not answered."""

    tickets: Annotated[list[_Text], Meta(max_length=MOST_TICKETS)]


class Release(msgspec.Struct, tag="release", frozen=True):
    """The reader's rank fetches no more; or all of its ranks. Not answered."""

    ticket: _Text
    whole: bool


class Found(msgspec.Struct, tag="found", frozen=True):
    rows: Annotated[list[_Index], Meta(max_length=MOST_NAMES)]
    """Of the leading names that the ticket has, their places in the memory whose descriptor comes along."""


Request = Get | Renew | Release
encode = msgspec.msgpack.Encoder().encode
decode_reader = msgspec.msgpack.Decoder(Reader).decode
decode_holder = msgspec.msgpack.Decoder(Holder | Refusal).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_found = msgspec.msgpack.Decoder(Found).decode


class PeerError(QuireError):
    """The other end sends what the protocol does not allow, is not who it should be, or has refused."""


class Seal:
    """The MACs of the messages of one direction of a connection."""

    def __init__(self, key: bytes, label: bytes, server: bytes, client: bytes) -> None:
        """server, client: their nonces."""
        self._key = proof(key, label, server, client)
        self._count = 0

    def next(self, body: bytes | memoryview) -> bytes:
        mac = hmac.new(self._key, self._count.to_bytes(8, "little"), "sha256")
        mac.update(body)
        self._count += 1
        return mac.digest()[:SEAL]

    def open(self, message: bytes | memoryview) -> memoryview:
        """The body of a received message. Raises `PeerError`."""
        body = memoryview(message)[SEAL:]
        if not hmac.compare_digest(message[:SEAL], self.next(body)):
            raise PeerError("a message was altered, lost or repeated")
        return body

    def close(self, body: bytes) -> bytes:
        """The message with its length."""
        return LENGTH.pack(SEAL + len(body)) + self.next(body) + body


def batches(sizes: Sequence[int]) -> Iterator[range]:
    """Blocks of these sizes, as they are put into frames."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > FRAME_BYTES:
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


class Stream:
    """The client's end of a connection, used by one thread at a time. Waits until `deadline`, then raises
    `TimeoutError`."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        """deadline: of `time.monotonic()`."""
        self.deadline = deadline
        self.descriptor: int | None = None
        """That came with the last message. Whoever takes it closes it."""
        self._sock = sock
        self.passes_memory = sock.family == socket.AF_UNIX
        self._buffer = bytearray(FRAME_BYTES + SEAL)

    def hello(self, key: bytes, reader: Reader) -> Holder:
        """Raises `PeerError`, `OSError`."""
        challenge = self._message(len(MAGIC) + NONCE)
        if challenge[:-NONCE] != MAGIC:
            raise PeerError("it does not answer as this version of Quire")
        theirs, ours = bytes(challenge[len(MAGIC) :]), os.urandom(NONCE)
        text = encode(reader)
        self.send_plain(MAGIC + ours + proof(key, b"reader", theirs, ours, text) + text)
        answer = bytes(self._message(HELLO_BYTES))
        mac, text = answer[:MAC], answer[MAC:]
        if not hmac.compare_digest(mac, proof(key, b"holder", theirs, ours, text)):
            raise PeerError(f"it has another key; set {KEY_VARIABLE} to the same text for both")
        holder = decode_holder(text)
        if isinstance(holder, Refusal):
            raise PeerError(f"it refuses: {holder.why}")
        self._in, self._out = server_seal(key, theirs, ours), client_seal(key, theirs, ours)
        return holder

    def send(self, request: Request) -> None:
        self._send(self._out.close(encode(request)))

    def send_plain(self, message: bytes) -> None:
        self._send(LENGTH.pack(len(message)) + message)

    def receive(self, most: int = REQUEST_BYTES) -> memoryview:
        """The body of the next message, valid until the next call. Raises `PeerError`, `OSError`."""
        return self._in.open(self._message(most + SEAL))

    def is_quiet(self) -> bool:
        """Whether the connection is open, and nothing has come that nobody asked for."""
        return not select.select([self._sock], [], [], 0)[0]

    def abort(self) -> None:
        """Ends what another thread waits for."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        self._sock.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._sock.settimeout(self._left())
            view = view[self._sock.send(view) :]

    def _message(self, most: int) -> memoryview:
        self._fill(LENGTH.size)
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > most:
            raise PeerError(f"it sends a message of {length} bytes")
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        self._fill(length)
        return memoryview(self._buffer)[:length]

    def _fill(self, count: int) -> None:
        view = memoryview(self._buffer)[:count]
        while view:
            self._sock.settimeout(self._left())
            got = self._receive_passed(view) if self.passes_memory else self._sock.recv_into(view)
            if not got:
                raise ConnectionResetError("it has closed the connection")
            view = view[got:]

    def _receive_passed(self, view: memoryview) -> int:
        size = array.array("i").itemsize
        got, extra, _, _ = self._sock.recvmsg_into(
            [view], socket.CMSG_LEN(size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= size:
                if self.descriptor is not None:
                    os.close(self.descriptor)
                (self.descriptor,) = struct.unpack("i", data[:size])
        return got

    def _left(self) -> float:
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("it took too long")
        return left


def server_seal(key: bytes, server: bytes, client: bytes) -> Seal:
    return Seal(key, b"from server", server, client)


def client_seal(key: bytes, server: bytes, client: bytes) -> Seal:
    return Seal(key, b"from client", server, client)

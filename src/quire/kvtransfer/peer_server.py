"""Gives the KV of an `ExportStore` to other instances: one thread for all connections of a rank."""

from __future__ import annotations

import array
import contextlib
import hmac
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from quire.distributed.hello import HELLO_SECONDS, MAC, NONCE, keep_alive, proof
from quire.distributed.links import Link, LinkError
from quire.kvtransfer import wire
from quire.kvtransfer.base import BlockBytes
from quire.kvtransfer.export import ExportStore
from quire.kvtransfer.share import KVShare, Run
from quire.kvtransfer.shared import check_user
from quire.kvtransfer.wire import Found, Get, Holder, PeerError, Reader, Refusal, Release, Renew
from quire.messages import BlockName

logger = logging.getLogger("quire.kvtransfer")

MOST_CONNECTIONS = 512
MOST_STRANGERS = 64
"""Connections that have not proved that they know the key; one more closes the oldest."""
SNAPSHOT_SECONDS = 5.0
"""A `Get` waits so long for the copies to begin."""
STALL_SECONDS = 30.0
"""A reader that takes nothing for so long is closed."""
IDLE_SECONDS = 900.0


class _Connection:
    def __init__(self, sock: socket.socket, name: str) -> None:
        self.link = Link(sock, name, max_bytes=wire.HELLO_BYTES)
        self.sock = sock
        self.nonce = os.urandom(NONCE)
        self.deadline = time.monotonic() + HELLO_SECONDS
        self.reader: Reader | None = None
        """Once it has proved that it knows the key."""
        self.seals: tuple[wire.Seal, wire.Seal] | None = None
        """Of what comes in and what goes out."""
        self.out: deque[memoryview] = deque()
        self.descriptor: int | None = None
        """To go out with the next byte."""
        self.frames: Iterator[bytes] = iter(())
        """To go out after `out`."""
        self.waiting: tuple[Get, float] | None = None
        """A request whose KV is not there yet, and until when it waits."""
        self.events = 0

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.frames = iter(())
        self.link.close()

    def send(self, message: bytes) -> None:
        self.out.append(memoryview(wire.LENGTH.pack(len(message)) + message))

    def push(self) -> bool:
        """Send what is to go out, or as much as there is room for (`BlockingIOError`), and at most one new
        frame. Returns whether there may be more frames."""
        self._flush()
        if (frame := next(self.frames, None)) is None:
            return False
        assert self.seals is not None
        self.out.append(memoryview(self.seals[1].close(frame)))
        self._flush()
        return True

    def _flush(self) -> None:
        while self.out:
            extra = []
            if self.descriptor is not None:
                descriptors = array.array("i", [self.descriptor])
                extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            sent = self.sock.sendmsg([self.out[0]], extra)
            self.deadline = time.monotonic() + STALL_SECONDS
            if self.descriptor is not None:
                os.close(self.descriptor)
                self.descriptor = None
            self.out[0] = self.out[0][sent:]
            if not self.out[0]:
                self.out.popleft()


class PeerServer:
    def __init__(
        self,
        listener: socket.socket,
        store: ExportStore,
        *,
        key: bytes,
        engine_id: str,
        share: KVShare,
        fingerprint: bytes,
    ) -> None:
        """listener: as `listen` makes it; it is closed with this server, and that with the store."""
        self._listener, self._store, self._key = listener, store, key
        self._share, self._fingerprint = share, fingerprint
        self._holder = Holder(engine_id, share)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._wakes, self._waker = socket.socketpair()
        self._passes = listener.family == socket.AF_UNIX
        """Whether readers get a descriptor of the memory."""
        self._closed = False
        for sock in (listener, self._wakes, self._waker):
            sock.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        store.changed, store.closing = self._wake, self.close
        self._thread = threading.Thread(target=self._run, name="quire-kv-server", daemon=True)
        self._thread.start()

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        """Closes all connections. Idempotent."""
        if not self._closed:
            self._closed = True
            self._store.changed = lambda: None
            self._wake()
            self._thread.join()
            self._waker.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            while not self._closed:
                for event, _ in self._selector.select(1.0):
                    if event.fileobj is self._listener:
                        self._accept()
                    elif event.fileobj is self._wakes:
                        with contextlib.suppress(OSError):
                            self._wakes.recv(4096)
                    elif event.fd in self._connections:
                        self._guarded(event.data)
                self._look_after()
        except Exception:
            logger.exception("the server of KV has failed; other instances find nothing here")
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._selector.close()
            if self._passes:
                with contextlib.suppress(OSError):
                    os.unlink(self._listener.getsockname())
            self._listener.close()
            self._wakes.close()

    def _look_after(self) -> None:
        """What no event announces."""
        self._store.expire()
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if connection.waiting is not None:
                self._guarded(connection)
            elif now >= connection.deadline:
                self._drop(connection, "it was silent for too long")

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:
            return
        strangers = [each for each in self._connections.values() if each.reader is None]
        if len(self._connections) >= MOST_CONNECTIONS and not strangers:
            sock.close()
            return
        if len(strangers) >= MOST_STRANGERS or len(self._connections) >= MOST_CONNECTIONS:
            self._drop(strangers[0], "it said nothing, and others wait")
        try:
            (check_user if sock.family == socket.AF_UNIX else keep_alive)(sock)
        except (OSError, PeerError) as error:
            logger.warning("closed a connection: %s", error)
            sock.close()
            return
        connection = _Connection(sock, str(address[:2] if address else "a process here"))
        connection.send(wire.MAGIC + connection.nonce)
        self._connections[sock.fileno()] = connection
        self._guarded(connection)

    def _guarded(self, connection: _Connection) -> None:
        """Whatever a connection sends or does ends that connection at most."""
        try:
            self._serve(connection)
        except (LinkError, PeerError, OSError, msgspec.MsgspecError) as error:
            self._drop(connection, str(error))
        except Exception as error:
            logger.exception("an error of Quire's ended a connection")
            self._drop(connection, str(error))

    def _serve(self, connection: _Connection) -> None:
        """Send and receive as far as it goes without waiting."""
        while True:
            try:
                more = connection.push()
            except BlockingIOError:
                more = True
            if more:  # other connections are served before its next frame
                return self._watch(connection, selectors.EVENT_WRITE)
            if connection.waiting is not None:
                if not self._answer(connection, *connection.waiting):
                    return self._watch(connection, 0)
                continue
            if (message := connection.link.poll()) is None:
                return self._watch(connection, selectors.EVENT_READ)
            connection.deadline = time.monotonic() + IDLE_SECONDS
            if connection.seals is None:
                self._greet(connection, message)
            else:
                self._receive(connection, wire.decode_request(connection.seals[0].open(message)))

    def _greet(self, connection: _Connection, message: bytes) -> None:
        head = len(wire.MAGIC)
        theirs, message = message[head : head + NONCE], message[:head] + message[head + NONCE :]
        mac, text = message[head : head + MAC], message[head + MAC :]
        nonces = connection.nonce, theirs
        if not message.startswith(wire.MAGIC):
            answer: Holder | Refusal = Refusal("install the same version of Quire for both")
        elif not hmac.compare_digest(mac, proof(self._key, b"reader", *nonces, text)):
            answer = Refusal(f"set {wire.KEY_VARIABLE} to the same text for both")
        else:
            connection.reader = wire.decode_reader(text)
            answer = self._holder
            if connection.reader.fingerprint != self._fingerprint:
                answer = Refusal("it serves another model, or with other options that change KV")
        body = wire.encode(answer)
        connection.send(proof(self._key, b"holder", *nonces, body) + body)
        if isinstance(answer, Refusal):
            connection.push()
            raise PeerError(f"refused: {answer.why}")
        connection.link.max_bytes = wire.REQUEST_BYTES
        connection.seals = (
            wire.client_seal(self._key, *nonces),
            wire.server_seal(self._key, *nonces),
        )

    def _receive(self, connection: _Connection, request: wire.Request) -> None:
        reader = connection.reader
        assert reader is not None
        if isinstance(request, Get):
            connection.waiting = (request, time.monotonic() + SNAPSHOT_SECONDS)
        elif isinstance(request, Renew):
            for ticket in request.tickets:
                self._store.open(ticket, reader.engine_id)
        elif isinstance(request, Release):
            ranks = range(reader.ranks) if request.whole else (reader.rank,)
            self._store.release(request.ticket, reader.engine_id, set(ranks), reader.ranks)

    def _answer(self, connection: _Connection, get: Get, until: float) -> bool:
        """False: its KV is not there yet."""
        assert connection.reader is not None and connection.seals is not None
        held = self._store.open(get.ticket, connection.reader.engine_id)
        found: list[tuple[int, BlockBytes, BlockName]] = []
        if held is not None:
            if held.snapshot is None and time.monotonic() < until:
                return False
            if held.snapshot is not None:
                held.snapshot.wait()
                for name in get.names:
                    if (place := held.rows.get(name)) is None:
                        break
                    found.append((*place, name))
        connection.waiting = None
        body = wire.encode(Found([row for row, _, _ in found]))
        connection.out.append(memoryview(connection.seals[1].close(body)))
        if held is not None and held.memory is not None and found:
            if self._passes:
                connection.descriptor = held.memory.duplicate()
            else:
                runs = self._share.runs(get.layers, get.heads)
                connection.frames = _frames([(data, runs[name[1]]) for _, data, name in found])
        return True

    def _watch(self, connection: _Connection, events: int) -> None:
        if events == connection.events:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.events:
            self._selector.modify(connection.sock, events, connection)
        else:
            self._selector.register(connection.sock, events, connection)
        connection.events = events

    def _drop(self, connection: _Connection, why: str = "") -> None:
        if connection.sock.fileno() in self._connections:
            self._watch(connection, 0)
            del self._connections[connection.sock.fileno()]
            log = logger.debug if connection.reader is not None else logger.warning
            if why:
                log("closed a connection from %s: %s", connection.link.peer, why)
        connection.close()


def _frames(blocks: Sequence[tuple[BlockBytes, list[Run]]]) -> Iterator[bytes]:
    """The runs of each block, in frames."""
    sizes = [sum(size for _, size in runs) for _, runs in blocks]
    for batch in wire.batches(sizes):
        yield b"".join(
            data.data[start : start + size]
            for data, runs in (blocks[i] for i in batch)
            for start, size in runs
        )

"""Fetches KV that other instances hold: connections of one rank to their ranks."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.distributed.hello import keep_alive
from quire.kvtransfer import shared, wire
from quire.kvtransfer.export import LEASE_SECONDS
from quire.kvtransfer.share import KVShare
from quire.kvtransfer.wire import Get, Holder, PeerError, Reader, Release, Renew, Stream
from quire.messages import BlockName, KVSource

logger = logging.getLogger("quire.kvtransfer")

CONNECT_SECONDS = 3.0
"""At most, for a connection and its hello."""
DOWN_SECONDS = 2.0
"""An instance that could not be reached is not tried again for so long."""
MOST_DOWN = 1024
CLOSE_SECONDS = 1.0
"""`close` waits so long for the last releases."""
LOG_SECONDS = 5.0
"""Failed fetches are logged once in so long."""
MOST_IDLE = 4
"""Connections to one rank that are kept for the next fetches."""

Endpoint = tuple[str, int]


@dataclass(slots=True)
class _Connection:
    endpoint: Endpoint
    stream: Stream
    holder: Holder


class PeerClient:
    """All methods may be called from several threads."""

    def __init__(
        self,
        *,
        allowed: Callable[[str, Sequence[int]], bool],
        key: bytes,
        engine_id: str,
        rank: int,
        ranks: int,
        share: KVShare,
        fingerprint: bytes,
        lease: float = LEASE_SECONDS,
    ) -> None:
        """allowed: `KVTransfer.admits`: whether it may connect to a host's ports at all. rank: of the `ranks`
        of this instance."""
        self._allowed, self._key, self._share = allowed, key, share
        self._reader = Reader(engine_id, rank, ranks, fingerprint)
        self._renew_every = lease / 4
        self._lock = threading.Lock()
        self._idle: dict[Endpoint, list[_Connection]] = {}
        self._busy: set[Stream] = set()
        self._down: dict[Endpoint, float] = {}
        self._held: dict[str, KVSource] = {}
        """By ticket, those that are renewed."""
        self._releases: queue.SimpleQueue[tuple[KVSource, bool] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._logged = -LOG_SECONDS
        self._closing = self._closed = False

    def fetch(
        self, source: KVSource, names: Sequence[BlockName], out: NDArray[np.uint8], timeout: float
    ) -> int:
        """Write the KV of leading names, this rank's layers and heads, to `out`, [len(names), block_bytes].
        Returns how many there are, verified. Takes at most about `timeout` seconds. Never raises."""
        deadline = time.monotonic() + timeout
        good = 0
        for _ in range(2):  # a connection may have ended since its last use
            fetch = _Fetch(self._share, names[good:], out[good:])
            try:
                with self._connections(source, deadline) as connections:
                    fetch.run(connections, source.ticket)
                return good + fetch.good
            except Exception as error:  # whatever a source names, or a peer sends
                good += fetch.good
                self._log(f"{good} of {len(names)} blocks from {_name(source)}: {error}")
                if self._closed or not isinstance(error, OSError) or time.monotonic() >= deadline:
                    break
        return good

    def done(self, source: KVSource) -> None:
        """This rank fetches no more with the source's ticket. Does not wait."""
        self._held.pop(source.ticket, None)
        self._later((source, False))

    def hold(self, source: KVSource) -> None:
        """From now on renew the lease, until `done` or `release`. Does not wait. At the sampling rank, for
        all ranks."""
        self._held[source.ticket] = source
        self._later(None)

    def release(self, source: KVSource) -> None:
        """No rank of this instance will fetch, or fetch more. Does not wait."""
        self._held.pop(source.ticket, None)
        self._later((source, True))

    def close(self) -> None:
        """Releases what is held, and ends calls of `fetch` that are under way. Idempotent."""
        if self._closed:
            return
        for source in list(self._held.values()):
            self.release(source)
        self._closing = True
        self._later(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        self._closed = True
        with self._lock:
            for stream in self._busy:
                stream.abort()
            idle = [each for kept in self._idle.values() for each in kept]
            self._idle.clear()
        for connection in idle:
            connection.stream.close()
        if self._thread is not None:
            self._thread.join()

    def _log(self, what: str) -> None:
        now = time.monotonic()
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            logger.warning("%s", what)

    # --- connections ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connections(self, source: KVSource, deadline: float) -> Iterator[list[_Connection]]:
        """To all ranks of the source. They are closed after an error."""
        if not (source.ports and self._allowed(source.host, source.ports)):
            raise PeerError("it is not among the configured peers")
        taken: list[_Connection] = []
        try:
            for port in source.ports:
                taken.append(self._take((source.host, port), deadline))
                if taken[-1].holder.engine_id != source.engine_id:
                    raise PeerError("another instance has taken its place")
            yield taken
        except BaseException:
            for connection in taken:
                self._give(connection, keep=False)
            raise
        for connection in taken:
            self._give(connection, keep=True)

    def _take(self, endpoint: Endpoint, deadline: float) -> _Connection:
        while True:
            with self._lock:
                idle = self._idle.get(endpoint)
                connection = idle.pop() if idle else None
                if connection is not None:
                    self._busy.add(connection.stream)
            if connection is None:
                return self._open(endpoint, deadline)
            if connection.stream.is_quiet():
                connection.stream.deadline = deadline
                return connection
            self._give(connection, keep=False)

    def _open(self, endpoint: Endpoint, deadline: float) -> _Connection:
        now = time.monotonic()
        if now < self._down.get(endpoint, 0.0):
            raise PeerError("it could not be reached a moment ago")
        until = min(deadline, now + CONNECT_SECONDS)
        try:
            stream = Stream(self._connect(endpoint, until), until)
            with self._lock:
                self._busy.add(stream)
                if self._closed:
                    stream.abort()
            try:
                connection = _Connection(endpoint, stream, stream.hello(self._key, self._reader))
            except BaseException:
                with self._lock:
                    self._busy.discard(stream)
                stream.close()
                raise
        except OSError:
            if len(self._down) >= MOST_DOWN:
                self._down.clear()
            self._down[endpoint] = time.monotonic() + DOWN_SECONDS
            raise
        self._down.pop(endpoint, None)
        stream.deadline = deadline
        return connection

    def _connect(self, endpoint: Endpoint, until: float) -> socket.socket:
        host, port = endpoint
        if self._closed:
            raise PeerError("this instance ends")
        if host.startswith("unix:"):
            return shared.connect(host.removeprefix("unix:"), port, until - time.monotonic())
        address = _resolve(host.strip("[]"), until)
        if not self._key and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            raise PeerError(
                f"a peer beyond this machine needs a shared key: set {wire.KEY_VARIABLE}"
            )
        sock = socket.create_connection((address, port), max(0.001, until - time.monotonic()))
        keep_alive(sock)
        return sock

    def _give(self, connection: _Connection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection.stream)
            idle = self._idle.setdefault(connection.endpoint, [])
            keep = keep and not self._closed and len(idle) < MOST_IDLE
            if keep:
                idle.append(connection)
            elif not idle:
                del self._idle[connection.endpoint]
        if not keep:
            connection.stream.close()

    # --- leases ---------------------------------------------------------------------------------------

    def _later(self, what: tuple[KVSource, bool] | None) -> None:
        if self._closed:
            return
        self._releases.put(what)
        if self._closing and self._thread is None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._look_after, name="quire-kv-leases", daemon=True
                )
                self._thread.start()

    def _look_after(self) -> None:
        renewed = 0.0
        new: set[str] = set()
        while True:
            with contextlib.suppress(queue.Empty):
                released = self._releases.get(timeout=self._renew_every if self._held else None)
                if released is not None:
                    self._tell([released[0]], Release(released[0].ticket, released[1]))
            if self._closed or (self._closing and self._releases.empty()):
                return
            held = dict(self._held)
            due = time.monotonic() - renewed >= self._renew_every
            self._renew([source for ticket, source in held.items() if due or ticket not in new])
            new = set(held)
            if due:
                renewed = time.monotonic()

    def _renew(self, sources: Sequence[KVSource]) -> None:
        places: dict[tuple[str, tuple[int, ...], str], list[KVSource]] = {}
        for source in sources:
            place = source.host, source.ports, source.engine_id
            places.setdefault(place, []).append(source)
        for group in places.values():
            for start in range(0, len(group), wire.MOST_TICKETS):
                some = group[start : start + wire.MOST_TICKETS]
                self._tell(some, Renew([source.ticket for source in some]))

    def _tell(self, sources: Sequence[KVSource], request: Renew | Release) -> None:
        """All ranks of the instance of these sources."""
        try:
            with self._connections(sources[0], time.monotonic() + CONNECT_SECONDS) as connections:
                for connection in connections:
                    connection.stream.send(request)
        except Exception as error:  # whatever a source names, or a peer sends
            logger.debug("%s: %s", _name(sources[0]), error)


class _Fetch:
    """Blocks of one rank, from ranks that may divide the model in another way."""

    def __init__(self, share: KVShare, names: Sequence[BlockName], out: NDArray[np.uint8]) -> None:
        self.good = 0
        self.share, self.names, self.out = share, names, out

    def run(self, connections: Sequence[_Connection], ticket: str) -> None:
        """Raises what a connection raises; `good` counts what came before that."""
        others = [connection.holder.share for connection in connections]
        divided = self.share.divide(others) if all(map(self.share.fits, others)) else None
        if divided is None:
            raise PeerError("its ranks do not have this rank's layers and heads")
        parts = [
            _Part(self, connection, layers, heads)
            for connection, (layers, heads) in zip(connections, divided, strict=True)
            if layers
        ]
        for part in parts:
            part.ask(ticket)
        for part in parts:
            part.begin()
        count = min(part.count for part in parts)
        while self.good < count:
            min(parts, key=lambda part: part.good).read()
            self.good = min(part.good for part in parts)
        if any(part.count > count for part in parts):
            raise PeerError("one of its ranks lacks blocks that others have")


class _Part:
    """What one rank of the holder has of these blocks."""

    def __init__(
        self,
        fetch: _Fetch,
        connection: _Connection,
        layers: tuple[int, ...],
        heads: tuple[int, int],
    ) -> None:
        self.good = self.count = 0
        self._stream, self._names, self._out = connection.stream, fetch.names, fetch.out
        self._layers, self._heads = layers, heads
        self._row_bytes = connection.holder.share.block_bytes
        self._their_runs = connection.holder.share.runs(layers, heads)
        self._runs = fetch.share.runs(layers, heads)
        self._sizes = [sum(size for _, size in self._runs[group]) for _, group in self._names]
        self._batches: Iterator[range] = iter(())
        self._found: list[int] = []
        self._memory: NDArray[np.uint8] | None = None

    def ask(self, ticket: str) -> None:
        self._stream.send(Get(ticket, list(self._names), list(self._layers), self._heads))

    def begin(self) -> None:
        self._found = wire.decode_found(self._stream.receive()).rows
        self.count = len(self._found)
        if self.count > len(self._names):
            raise PeerError("it has found more blocks than were asked for")
        self._batches = wire.batches(self._sizes[: self.count])
        if self._stream.passes_memory and self._found:
            descriptor, self._stream.descriptor = self._stream.descriptor, None
            rows = max(self._found) + 1
            self._memory = shared.open_memory(descriptor, rows, self._row_bytes)

    def read(self) -> None:
        """A frame."""
        batch = next(self._batches)
        size = sum(self._sizes[batch.start : batch.stop])
        if self._memory is not None:
            data = np.concatenate(
                [
                    self._memory[self._found[index], start : start + length]
                    for index in batch
                    for start, length in self._their_runs[self._names[index][1]]
                ]
            )
        else:
            data = np.frombuffer(self._stream.receive(size), np.uint8)
        if len(data) != size:
            raise PeerError("it sends blocks of another size")
        start = 0
        for index in batch:
            for first, length in self._runs[self._names[index][1]]:
                self._out[index, first : first + length] = data[start : start + length]
                start += length
        self.good = batch.stop


def _name(source: KVSource) -> str:
    return f"{source.host[:256]!r}, port {', '.join(map(str, source.ports[:8]))}"


def _resolve(host: str, until: float) -> str:
    """The address of a name. Raises `OSError`, in time even if the resolver does not answer."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    answers: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="quire-kv-resolver", daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, until - time.monotonic()))
    except queue.Empty:
        raise TimeoutError(f"the address of {host} was not found in time") from None
    if isinstance(answer, OSError):
        raise answer
    return answer

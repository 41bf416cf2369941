"""What a peer may send: anything. The other end closes the connection, and serves others."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.distributed.hello import MAC, NONCE, proof
from quire.kvtransfer import peer_server, shared, wire
from quire.kvtransfer.peer_client import PeerClient
from quire.kvtransfer.share import KVShare
from quire.kvtransfer.wire import Found, Get, Holder, PeerError, Reader, Release, Renew, Stream
from quire.messages import KVSource
from tests.kvtransfer.instances import (
    FINGERPRINT,
    KEY,
    SECONDS,
    UNIX,
    Instances,
    comes_true,
    divided,
    names,
)

SHARE = divided()[0]
READER = Reader("D", 0, 1, FINGERPRINT)
PLAIN = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
indices = st.integers(-2, 2**20 + 2)
block_names = st.lists(st.tuples(st.binary(max_size=70), st.integers(-2, 5)), max_size=5)
requests = (
    st.builds(
        Get,
        ticket=st.text(max_size=300),
        names=block_names,
        layers=st.lists(indices, max_size=8),
        heads=st.tuples(indices, indices),
    )
    | st.builds(Renew, tickets=st.lists(st.text(max_size=300), max_size=4))
    | st.builds(Release, ticket=st.text(max_size=300), whole=st.booleans())
)
bodies = st.binary(max_size=200) | anything.map(wire.encode) | requests.map(wire.encode)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instances]:
    with Instances(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


def connect(both: Instances) -> Stream:
    sock = socket.create_connection(("127.0.0.1", both.holders[0].port or 0))
    return Stream(sock, time.monotonic() + SECONDS)


def still_serves(both: Instances) -> None:
    wanted = names(2)
    source = both.held(wanted)
    assert both.fetch(source, wanted) == 4
    peers = both.readers[0].peers
    assert peers is not None
    peers.done(source)
    assert comes_true(lambda: both.num_held == 0)


@PLAIN
@given(data=st.lists(st.binary(max_size=300), max_size=3), framed=st.booleans())
def test_a_stranger_may_say_anything(both: Instances, data: list[bytes], framed: bool) -> None:
    stream = connect(both)
    with contextlib.suppress(OSError):
        for piece in data:
            if framed:
                stream.send_plain(piece)
            else:
                stream._send(piece)
    stream.close()
    still_serves(both)


@PLAIN
@given(text=bodies | st.builds(Reader, st.text(), indices, indices, st.binary()).map(wire.encode))
def test_a_hello_may_say_anything(both: Instances, text: bytes) -> None:
    stream = connect(both)
    challenge = bytes(stream._message(wire.HELLO_BYTES))
    theirs, ours = challenge[len(wire.MAGIC) :], os.urandom(NONCE)
    with contextlib.suppress(OSError, PeerError, msgspec.MsgspecError):
        stream.send_plain(wire.MAGIC + ours + proof(KEY, b"reader", theirs, ours, text) + text)
        answer = bytes(stream._message(wire.HELLO_BYTES))
        wire.decode_holder(answer[MAC:])
    stream.close()
    still_serves(both)


@PLAIN
@given(sent=st.lists(bodies, max_size=4), end=st.binary(max_size=30))
def test_a_reader_may_ask_for_anything(both: Instances, sent: list[bytes], end: bytes) -> None:
    stream = connect(both)
    stream.hello(KEY, READER)
    with contextlib.suppress(OSError):
        for body in sent:
            stream._send(stream._out.close(body))
        stream._send(end)
    stream.close()
    still_serves(both)


@PLAIN
@given(
    layers=st.lists(st.integers(0, 6), max_size=8),
    heads=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    start=st.integers(0, 9),
)
def test_any_layers_and_heads_of_blocks_that_are_held(
    both: Instances, layers: list[int], heads: tuple[int, int], start: int
) -> None:
    wanted = names(5)
    source = both.held(wanted)
    stream = connect(both)
    share = stream.hello(KEY, READER).share
    stream.send(Get(source.ticket, wanted[start:], layers, heads))
    assert wire.decode_found(stream.receive()).rows == list(range(start, 10))
    runs = share.runs(layers, heads)
    sizes = [sum(size for _, size in runs[group]) for _, group in wanted[start:]]
    for batch in wire.batches(sizes):
        size = sum(sizes[batch.start : batch.stop])
        assert len(stream.receive(size)) == size
    stream.send(Release(source.ticket, True))
    stream.close()
    assert comes_true(lambda: both.num_held == 0)


class Impostor:
    """It knows the key, and then sends whatever it likes."""

    def __init__(
        self, answers: Callable[[wire.Seal, int], list[bytes]], share: KVShare = SHARE
    ) -> None:
        self._answers, self._share = answers, share
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                self._serve(Stream(sock, time.monotonic() + SECONDS))

    def _serve(self, stream: Stream) -> None:
        ours = os.urandom(NONCE)
        stream.send_plain(wire.MAGIC + ours)
        theirs = bytes(stream._message(wire.HELLO_BYTES))[len(wire.MAGIC) :][:NONCE]
        text = wire.encode(Holder("P", self._share))
        stream.send_plain(proof(KEY, b"holder", ours, theirs, text) + text)
        seal = wire.server_seal(KEY, ours, theirs)
        stream._message(1 << 20)
        for message in self._answers(seal, 0):
            stream._send(message)

    def fetch(self, timeout: float = SECONDS) -> int:
        client = PeerClient(
            allowed=lambda host, ports: True,
            key=KEY,
            engine_id="D",
            rank=0,
            ranks=1,
            share=SHARE,
            fingerprint=FINGERPRINT,
        )
        out = np.zeros((4, SHARE.block_bytes), np.uint8)
        source = KVSource(
            engine_id="P", host="127.0.0.1", ports=(self.port,), ticket="t", num_tokens=64
        )
        try:
            return client.fetch(source, names(2), out, timeout)
        finally:
            client.close()

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)


found = st.lists(st.integers(-2, 2**20 + 2), max_size=6).map(lambda rows: wire.encode(Found(rows)))


@PLAIN
@given(bodies=st.lists(found | bodies, max_size=3), end=st.binary(max_size=30))
def test_a_holder_may_answer_anything(bodies: list[bytes], end: bytes) -> None:
    def answers(seal: wire.Seal, _: int) -> list[bytes]:
        return [*map(seal.close, bodies), end]

    with Impostor(answers) as impostor:
        assert impostor.fetch() <= 4


@pytest.mark.parametrize("length", [2**32 - 1, 1 << 22, (1 << 22) + 17])
def test_a_length_takes_no_memory(length: int) -> None:
    def answers(seal: wire.Seal, _: int) -> list[bytes]:
        return [struct.pack("<I", length)]

    with Impostor(answers) as impostor:
        assert impostor.fetch(0.2) == 0


@pytest.mark.parametrize(
    "share",
    [
        KVShare(((), ()), (0, 4), SHARE.head_bytes),
        KVShare(((4, 2, 0), (1, 3)), (0, 4), SHARE.head_bytes),
        KVShare(SHARE.layers, (-5, 10**9), SHARE.head_bytes),
        KVShare(SHARE.layers, (4, 0), SHARE.head_bytes),
        KVShare(SHARE.layers, (0, 4), 0),
        KVShare((tuple(range(3000)),) * 2, (0, 4), SHARE.head_bytes),
        KVShare((), (0, 4), SHARE.head_bytes),
    ],
)
def test_a_holder_may_claim_any_share(share: KVShare) -> None:
    with Impostor(lambda seal, _: [seal.close(wire.encode(Found([])))], share) as impostor:
        assert impostor.fetch() == 0


def test_strangers_make_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "MOST_STRANGERS", 4)
    with Instances(tmp_path) as both, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.callback(connect(both).close)
        server = both.holders[0].server
        assert server is not None
        still_serves(both)
        assert server.num_connections <= 6


def test_readers_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "MOST_CONNECTIONS", 3)
    with Instances(tmp_path) as both, contextlib.ExitStack() as stack:
        streams = [connect(both) for _ in range(3)]
        for stream in streams:
            stack.callback(stream.close)
            stream.hello(KEY, READER)
        late = connect(both)
        stack.callback(late.close)
        with pytest.raises(OSError):
            late.hello(KEY, READER)
        streams[0].close()
        assert comes_true(lambda: both.holders[0].server.num_connections == 2)  # type: ignore[union-attr]
        still_serves(both)


def test_the_silent_and_the_stuck_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_server, "HELLO_SECONDS", 0.1)
    monkeypatch.setattr(peer_server, "STALL_SECONDS", 0.1)
    big = [KVShare(((0,),), (0, 4), 1 << 20)]
    with Instances(tmp_path, holders=big, readers=big, max_bytes=1 << 28) as both:
        wanted = names(2, groups=1)
        ticket = both.issue(wanted)
        exports, server = both.holders[0].exports, both.holders[0].server
        assert exports is not None and server is not None
        exports.reserve(ticket, wanted)
        exports.ready(ticket, type("Filled", (), {"wait": lambda self: None})())
        silent, stuck = connect(both), connect(both)
        stuck.hello(KEY, READER)
        stuck.send(Get(ticket, wanted, [0], (0, 4)))
        assert comes_true(lambda: server.num_connections == 0)
        silent.close()
        stuck.close()


@pytest.mark.parametrize("wrong", ["none", "short", "unsealed", "file"])
def test_memory_that_could_change_or_end_is_refused(wrong: str, tmp_path: Path) -> None:
    def descriptor() -> int | None:
        if wrong == "none":
            return None
        if wrong == "short":
            memory = shared.SharedMemory(4095)
            copy = memory.duplicate()
            memory.close()
            return copy
        if wrong == "file":
            place = tmp_path / "file"
            place.write_bytes(b"\0" * 8192)
            return os.open(place, os.O_RDONLY)
        made = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(made, 8192)
        return made

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((PeerError, OSError)):
        shared.open_memory(descriptor(), 2, 4096)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_cannot_write_to_shared_memory() -> None:
    import mmap

    memory = shared.SharedMemory(8192)
    (row, _) = memory.rows(2, 4096)
    row[:] = 5
    descriptor = memory.duplicate()
    assert descriptor is not None
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 8192)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 100)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    seen = shared.open_memory(descriptor, 2, 4096)
    memory.close()
    memory.close()
    assert memory.duplicate() is None
    assert (seen[0] == 5).all() and not seen.flags.writeable
    row[:] = 6
    assert (seen[0] == 6).all()


def test_a_socket_is_in_a_private_place(tmp_path: Path) -> None:
    from quire.errors import ConfigError

    place = tmp_path / "new" / "kv"
    first = shared.listen(str(place), 3)
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert Path(f"{place}.3").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="Another process"):
        shared.listen(str(place), 3)
    first.close()
    shared.listen(str(place), 3).close()  # in place of one whose process has died
    place.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="written by others"):
        shared.listen(str(place), 3)
    with pytest.raises(ConfigError, match="longer"):
        shared.listen("/tmp/" + "x" * 120, 0)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Instances(tmp_path, UNIX) as both:
        source = both.held(names(1))
        monkeypatch.setattr(shared.os, "getuid", lambda: 12345)
        assert both.fetch(source, names(1)) == 0

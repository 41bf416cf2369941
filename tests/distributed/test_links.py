"""Framed messages: order, sizes, ends, peers that do not read, bytes that are no frames."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from quire.distributed.links import Link, LinkError, pair, send_all

Two = tuple[Link, Link]


@pytest.fixture(params=["unix", "tcp"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    if request.param == "unix":
        sockets = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            sockets = (client, server.accept()[0])
    links = Link(sockets[0], "rank 1", timeout=0.3), Link(sockets[1], "rank 0", timeout=0.3)
    yield links
    for link in links:
        link.close()


def test_messages_come_whole_and_in_order(two: Two) -> None:
    rng = random.Random(1)
    sizes = [
        0,
        1,
        3,
        4,
        5,
        65535,
        65536,
        65537,
        3_000_000,
        *(rng.randrange(5000) for _ in range(300)),
    ]
    messages = [rng.randbytes(size) for size in sizes]
    received: list[bytes | None] = []
    reader = threading.Thread(
        target=lambda: received.extend(two[1].receive(timeout=20) for _ in messages)
    )
    reader.start()
    for message in messages:
        two[0].send(message)
    reader.join()
    assert received == messages
    assert two[1].poll() is None


def test_a_frame_in_pieces_is_one_message() -> None:
    raw, end = socket.socketpair()
    with raw:
        link = Link(end, "rank 0")
        for byte in b"\x03\0\0\0abc\0\0\0":
            raw.send(bytes([byte]))
            message = link.poll()
            assert message == (b"abc" if byte == ord("c") else None)
        raw.send(b"\0")
        assert link.poll() == b""
        link.close()


def test_what_was_sent_before_the_end_is_read_first(two: Two) -> None:
    for text in (b"first", b"second"):
        two[0].send(text)
    two[0].close()
    assert [two[1].receive(), two[1].receive()] == [b"first", b"second"]
    for call in (two[1].poll, two[1].receive):
        with pytest.raises(LinkError, match=r"rank 0 was closed by the other end"):
            call()


def test_receiving_waits_no_longer_than_wanted(two: Two) -> None:
    assert two[0].receive(timeout=0.0) is None
    assert two[0].receive(timeout=0.05) is None
    sender = threading.Timer(0.05, two[1].send, (b"x",))
    sender.start()
    assert two[0].receive(timeout=20) == b"x"
    sender.join()


def test_a_wait_takes_no_processor_time(two: Two) -> None:
    before = time.thread_time()
    assert two[0].receive(timeout=0.5) is None
    assert time.thread_time() - before < 0.25


def test_a_peer_that_does_not_read_delays_no_other() -> None:
    (stuck, unread), (good, other) = pair("rank 1"), pair("rank 2")
    reader = Link(other, "rank 0")
    stuck._timeout = 0.2
    seen: list[bytes | None] = []
    thread = threading.Thread(target=lambda: seen.append(reader.receive(timeout=20)))
    thread.start()
    message = b"x" * 8_000_000
    with pytest.raises(LinkError, match=r"rank 1 took no message for 0\.2 s"):
        send_all((stuck, good), message)
    thread.join()
    assert seen == [message]
    for end in (stuck, good, reader, unread):
        end.close()


def test_a_length_above_the_limit_ends_the_link() -> None:
    raw, end = socket.socketpair()
    link = Link(end, "10.0.0.2", max_bytes=1000)
    raw.send(b"GET / HTTP/1.1\r\n")
    with pytest.raises(LinkError, match="a message of 542393671 bytes, above 1000"):
        link.poll()
    with pytest.raises(ValueError, match="1001 bytes"):
        link.send(bytes(1001))
    raw.close()
    link.close()


def test_every_link_is_tried_though_one_has_ended() -> None:
    (gone, theirs), (good, other) = pair("rank 1"), pair("rank 2")
    theirs.close()
    with pytest.raises(LinkError, match="rank 1"):
        send_all((gone, good), b"plan")
    reader = Link(other, "rank 0")
    assert reader.receive(timeout=20) == b"plan"
    for link in (gone, good, reader):
        link.close()


CHILD = """
import socket, sys
from quire.distributed.links import Link
link = Link(socket.socket(fileno=int(sys.argv[1])), "parent")
while (message := link.receive()) != b"end":
    link.send(message[::-1])
assert "torch" not in sys.modules
"""


def test_a_child_process_has_the_other_end() -> None:
    link, theirs = pair("the child")
    command = [sys.executable, "-c", CHILD, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        for text in (b"abc", b""):
            link.send(text)
            assert link.receive(timeout=60) == text[::-1]
        link.send(b"end")
        with pytest.raises(LinkError):
            link.receive(timeout=60)
        assert child.wait(60) == 0
    link.close()

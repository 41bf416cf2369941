"""Links between machines: a key that both know, the same facts at every rank, and strangers at the port."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quire.distributed import hello
from quire.distributed.hello import Facts, accept_all, connect, listen, read_key, require_key
from quire.distributed.links import Link, LinkError
from quire.errors import ConfigError

KEY = b"0123456789abcdef"
FACTS = {"version": "0.1.0", "model": "a1b2", "dtype": "bfloat16", "tensor_parallel_size": 4}
SECONDS = 20.0
"""Enough for all that should come."""


class Meeting:
    """The first machine and the ranks that connect to it, each in a thread."""

    def __init__(self, ranks: tuple[int, ...] = (1, 2)) -> None:
        self.ranks = ranks
        self.listener = listen("127.0.0.1", 0, KEY)
        self.port = self.listener.getsockname()[1]
        self.pool = ThreadPoolExecutor(8)

    def accept(self, *, key: bytes = KEY, timeout: float = SECONDS):
        return self.pool.submit(accept_all, self.listener, key, FACTS, self.ranks, timeout=timeout)

    def connect(
        self, rank: int, *, key: bytes = KEY, facts: Facts = FACTS, timeout: float = SECONDS
    ):
        return self.pool.submit(connect, "127.0.0.1", self.port, key, facts, rank, timeout=timeout)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.listener.close()


def errors(*futures) -> list[str]:
    found = []
    for future in futures:
        with pytest.raises(ConfigError) as caught:
            future.result(SECONDS + 5)
        found.append(str(caught.value))
    return found


def test_all_ranks_meet_and_have_links() -> None:
    with Meeting() as m:
        waiting = m.accept()
        others = {rank: m.connect(rank) for rank in m.ranks}
        links = waiting.result()
        assert sorted(links) == [1, 2] and links[1].peer.startswith("rank 1 (127.0.0.1:")
        for rank, link in links.items():
            link.send(b"plan" * 5000)
            other = others[rank].result()
            assert other.receive(timeout=SECONDS) == b"plan" * 5000
            other.send(b"ok")
            assert link.receive(timeout=SECONDS) == b"ok"
            link.close()
            other.close()


def test_a_rank_may_start_before_the_first_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(connect, "127.0.0.1", port, KEY, FACTS, 1, timeout=SECONDS)
        time.sleep(0.3)
        with listen("127.0.0.1", port, KEY) as listener:
            links = accept_all(listener, KEY, FACTS, [1], timeout=SECONDS)
        early.result().close()
        links[1].close()


def test_another_key_is_one_error_at_every_machine() -> None:
    with Meeting() as m:
        waiting, right = m.accept(), m.connect(1)
        wrong = m.connect(2, key=b"another key of 16")
        first, one, two = errors(waiting, right, wrong)
    assert "has another key than this node; set QUIRE_NODE_KEY" in first
    assert one == first
    assert "has another key than this node; set QUIRE_NODE_KEY" in two


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "ffff"}, "model is 'ffff', not 'a1b2'"),
        ({"version": "0.2.0"}, "version is '0.2.0', not '0.1.0'"),
        ({"tensor_parallel_size": 2, "dtype": "float32"},
         "dtype is 'float32', not 'bfloat16'; tensor_parallel_size is 2, not 4"),
        ({"new": 1}, "new is 1, not None"),
    ],
)  # fmt: skip
def test_other_facts_are_one_error_at_every_machine(
    changed: dict[str, str | int], named: str
) -> None:
    with Meeting() as m:
        waiting, right = m.accept(), m.connect(1)
        wrong = m.connect(2, facts=FACTS | changed)
        found = errors(waiting, right, wrong)
    assert len(set(found)) == 1
    assert f"Rank 2 does not fit the first node: {named}. Start every node" in found[0]


@pytest.mark.parametrize(("rank", "named"), [(3, "not expected"), (1, "connected twice")])
def test_a_rank_too_many(rank: int, named: str) -> None:
    with Meeting() as m:
        waiting, right = m.accept(), m.connect(1)
        time.sleep(0.2)
        found = errors(waiting, m.connect(rank), right)
    assert len(set(found)) == 1 and f"Rank {rank}" in found[0] and named in found[0]


def test_another_version_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    with Meeting((1,)) as m:
        waiting = m.accept()
        with socket.create_connection(("127.0.0.1", m.port)) as raw:
            link = Link(raw, "first")
            assert link.receive(timeout=SECONDS)
            link.send(b"quire-link 2\n" + bytes(64) + b"something new")
            (first,) = errors(waiting)
    assert "another version of Quire's links" in first


def test_what_does_not_come_is_named() -> None:
    with Meeting() as m:
        waiting, right = m.accept(timeout=0.5), m.connect(1)
        first, one = errors(waiting, right)
    assert first == one and first.startswith("Rank 2 did not connect to 127.0.0.1:")
    with ThreadPoolExecutor(1) as pool:
        (late,) = errors(pool.submit(connect, "127.0.0.1", m.port, KEY, FACTS, 1, timeout=0.3))
    assert f"No first node at 127.0.0.1:{m.port}: Connection refused" in late


def test_a_rank_that_ends_while_it_waits_may_come_again() -> None:
    with Meeting() as m:
        waiting = m.accept()
        with socket.create_connection(("127.0.0.1", m.port)) as raw:
            link = Link(raw, "first")
            say_hello(link, 1)
            time.sleep(0.2)
        futures = [m.connect(1), m.connect(2)]
        ends = [*waiting.result().values(), *(f.result() for f in futures)]
        for end in ends:
            end.close()


def say_hello(link: Link, rank: int, key: bytes = KEY) -> bytes:
    challenge = link.receive(timeout=SECONDS)
    assert challenge is not None
    theirs, ours = challenge[len(hello.MAGIC) :], os.urandom(32)
    text = hello.msgspec.json.encode({"rank": rank, "facts": FACTS})
    message = hello.MAGIC + ours + hello.proof(key, b"rank", theirs, ours, text) + text
    link.send(message)
    return message


def test_a_hello_cannot_be_said_again() -> None:
    """A recorded hello, sent in another connection, is refused: its nonce is new."""
    with Meeting((1,)) as m:
        waiting = m.accept()
        with socket.create_connection(("127.0.0.1", m.port)) as raw:
            link = Link(raw, "first")
            recorded = say_hello(link, 1)
            assert link.receive(timeout=SECONDS)
        for end in waiting.result().values():
            end.close()
        waiting = m.accept()
        with socket.create_connection(("127.0.0.1", m.port)) as raw:
            Link(raw, "first").send(recorded)
            assert "another key" in errors(waiting)[0]


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("16030100f8010000f4030338"),
    "nothing": b"",
    "zeros": bytes(100_000),
    "a long frame": b"\xff\xff\xff\x7f",
    "a short frame": b"\x01\0\0\0x",
    "random": random.Random(3).randbytes(50_000),
    "no facts": b"\x20\0\0\0" + b"quire-link".ljust(32, b"x"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_changes_nothing(name: str) -> None:
    with Meeting((1,)) as m:
        waiting = m.accept()
        with socket.create_connection(("127.0.0.1", m.port)) as raw:
            try:
                raw.sendall(GARBAGE[name])
            except (ConnectionResetError, BrokenPipeError):
                pass
            mine = m.connect(1)
            for end in (*waiting.result().values(), mine.result()):
                end.close()


def test_silent_connections_are_closed_and_the_oldest_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hello, "MOST_STRANGERS", 3)
    monkeypatch.setattr(hello, "HELLO_SECONDS", 1.0)
    with Meeting((1,)) as m:
        waiting = m.accept()
        silent = [socket.create_connection(("127.0.0.1", m.port)) for _ in range(5)]
        for one in silent:  # two at once, to make room, the others after a second
            one.settimeout(SECONDS)
            while one.recv(100):
                pass
            one.close()
        mine = m.connect(1)
        for end in (*waiting.result().values(), mine.result()):
            end.close()


def test_the_other_end_is_no_quire() -> None:
    def answer(text: bytes, act: Callable[[int], None]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=act, args=(server.getsockname()[1],))
            thread.start()
            peer, _ = server.accept()
            peer.sendall(text)
            thread.join()
            peer.close()

    def act(port: int) -> None:
        with pytest.raises(ConfigError, match=r"does not answer as this version|refused rank 1"):
            connect("127.0.0.1", port, KEY, FACTS, 1, timeout=SECONDS)

    for text in (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x04\0\0\0abcd",
        b"\x0d\0\0\0quire-link 1\n",
    ):
        answer(text, act)


def test_an_address_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_NODE_KEY", raising=False)
    assert read_key() == b""
    for address in ("127.0.0.1", "localhost", "127.0.0.2"):
        require_key(address, b"")
    for call in (
        lambda: listen("0.0.0.0", 0, b""),
        lambda: connect("10.1.2.3", 29501, b"", FACTS, 1, timeout=1),
    ):
        with pytest.raises(ConfigError, match="need a shared key: set QUIRE_NODE_KEY"):
            call()


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_NODE_KEY", "k" * 16)
    file = tmp_path / "key"
    file.write_text("f" * 20 + "\n")
    assert read_key() == b"k" * 16
    assert read_key(str(file)) == b"f" * 20
    monkeypatch.setenv("QUIRE_NODE_KEY", "short")
    with pytest.raises(ConfigError, match=r"has 5 bytes, fewer than 16.*openssl rand -hex 32"):
        read_key()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key(str(tmp_path / "absent"))


def test_a_port_in_use_is_a_config_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"Cannot listen on 127\.0\.0\.1:{port}: Address already in use"
        ):
            listen("127.0.0.1", port, b"")
    with pytest.raises(ConfigError, match=r"'no\.such\.host\.invalid' is no address"):
        listen("no.such.host.invalid", 0, b"")


def test_the_mac_is_hmac_sha256() -> None:
    """RFC 4231, test case 2."""
    assert hello.proof(b"Jefe", b"what do ya want for nothing?").hex() == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )
    assert hashlib.sha256().digest_size == hello.MAC


def test_a_closed_first_machine_ends_the_wait() -> None:
    with Meeting((1, 2)) as m:
        one = m.connect(1)
        sock, _ = m.listener.accept()
        link = Link(sock, "rank 1")
        link.send(hello.MAGIC + bytes(32))
        assert link.receive(timeout=SECONDS)
        link.close()
        assert "The first node refused rank 1, or ended" in errors(one)[0]
    with pytest.raises(LinkError):
        link.send(b"x")

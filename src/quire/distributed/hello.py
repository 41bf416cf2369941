"""How links between machines begin: both ends prove that they know one key, then compare what they serve.

    first machine -> other   MAGIC, nonce
    other -> first machine   MAGIC, nonce, HMAC-SHA256, and as JSON: its rank and facts
    first machine -> other   HMAC-SHA256, and why it is refused, if it is

Each HMAC covers both nonces and the sender's text, under a label of its own, so that none can be used again.
The last message is sent when all ranks have come, or to all of them when one does not fit, so that every
machine reports the same error. A connection that sends anything else is closed, as is one that sends nothing
for HELLO_SECONDS. Frames after the hello are not protected: the network must be private.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import selectors
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from quire.distributed.links import MAX_BYTES, Link, LinkError
from quire.errors import ConfigError

logger = logging.getLogger("quire.distributed")

MAGIC = b"quire-link 1\n"
"""With the version of the protocol: of the hello, and of all messages on links."""
KEY_VARIABLE = "QUIRE_NODE_KEY"
MIN_KEY_BYTES = 16
HELLO_SECONDS = 10.0
HELLO_BYTES = 4096
MOST_STRANGERS = 64
"""Connections that have not said hello; one more closes the oldest."""
LINGER_SECONDS = 30.0
"""After a rank that does not fit, at most: until all others, which may start slower, have come and got the
error."""
RETRY_SECONDS = 0.2
NONCE = MAC = 32

Facts = Mapping[str, str | int]
"""What must be the same at every rank, like {"version": "0.1.0", "dtype": "bfloat16"}, by names that an
operator knows."""


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    rank: int
    facts: dict[str, str | int]


def read_key(path: str | None = None, variable: str = KEY_VARIABLE) -> bytes:
    """The shared key: a file's content, else the variable's, else b"". Raises `ConfigError`."""
    if path:
        try:
            key = Path(path).expanduser().read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"The key file {path} cannot be read: {error.strerror}.") from error
    else:
        key = os.environ.get(variable, "").encode()
    if (key or path) and len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"The key in {path or variable} has {len(key)} bytes, fewer than {MIN_KEY_BYTES}; make one with: "
            "openssl rand -hex 32."
        )
    return key


def require_key(address: str, key: bytes, variable: str = KEY_VARIABLE) -> None:
    """Raises `ConfigError` for an address that other machines reach, without a key."""
    if not key and not is_loopback(address):
        raise ConfigError(
            f"Processes that meet at {address} need a shared key: set {variable} to the same text for each "
            "(openssl rand -hex 32)."
        )


def is_loopback(address: str) -> bool:
    return all(ipaddress.ip_address(found[4][0]).is_loopback for found in _resolve(address, 0))


def listen(
    address: str,
    port: int,
    key: bytes,
    variable: str = KEY_VARIABLE,
    *,
    fields: tuple[str, str] = ("master_addr", "master_port"),
) -> socket.socket:
    """A listening socket; port 0: a free one. variable: that of the key. fields: of the options, for errors.
    Raises `ConfigError`."""
    require_key(address, key, variable)
    family, *_, where = _resolve(address, port)[0]
    try:
        return socket.create_server(where[:2], family=family, backlog=MOST_STRANGERS)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {address}:{port}: {error.strerror}; choose another {fields[1]}, or an "
            f"address of this machine as {fields[0]}."
        ) from error


def accept_all(
    listener: socket.socket, key: bytes, facts: Facts, ranks: Collection[int], *, timeout: float
) -> dict[int, Link]:
    """Wait for these ranks. Returns their links when all have come.

    Raises `ConfigError`, here and at every rank that has come, if one has another key or other facts, is
    not among `ranks`, or if some have not come after `timeout` seconds.
    """
    gate = _Gate(listener, key, facts, ranks)
    try:
        gate.run(time.monotonic() + timeout)
    except BaseException as error:
        gate.close(str(error) or "The first node has ended.")
        raise
    return gate.close("")


class _Stranger:
    """A connection that is waiting to be accepted, as the first machine sees it."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.link = Link(sock, name, timeout=HELLO_SECONDS, max_bytes=HELLO_BYTES)
        self.deadline = time.monotonic() + HELLO_SECONDS
        self.ours, self.theirs = os.urandom(NONCE), b""
        self.link.send(MAGIC + self.ours)


class _Gate:
    def __init__(
        self, listener: socket.socket, key: bytes, facts: Facts, ranks: Collection[int]
    ) -> None:
        self._listener, self._key, self._facts = listener, key, dict(facts)
        self._ranks = set(ranks)
        self._refusal = ""
        """Why all that still come are refused."""
        self._refused = 0
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[int, _Stranger] = {}
        self._accepted: dict[int, _Stranger] = {}
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self, deadline: float) -> None:
        while missing := sorted(self._ranks - set(self._accepted)):
            now = time.monotonic()
            if now >= deadline:
                raise ConfigError(
                    f"Rank {', '.join(map(str, missing))} did not connect to "
                    f"{_text(self._listener.getsockname())}; start every node with the same master_addr, "
                    "master_port and nnodes."
                )
            for stranger in list(self._strangers.values()):
                if now >= stranger.deadline:
                    self._drop(stranger, "said nothing")
            self._turn(min(deadline - now, 0.5))

    def _turn(self, seconds: float) -> None:
        for event, _ in self._selector.select(seconds):
            if event.fileobj is self._listener:
                self._accept()
            else:
                self._read(event.data)

    def close(self, refusal: str) -> dict[int, Link]:
        """Answer all that were accepted, and if one was refused, those that still come."""
        self._refusal = refusal
        end = time.monotonic() + LINGER_SECONDS
        while self._refused and time.monotonic() < end:
            if self._refused + len(self._accepted) >= len(self._ranks) and not self._strangers:
                break
            self._turn(0.05)
        links = {}
        for rank, stranger in self._accepted.items():
            self._answer(stranger, refusal)
            stranger.link.max_bytes = MAX_BYTES
            links[rank] = stranger.link
            stranger.link.peer = f"rank {rank} ({stranger.link.peer})"
        for stranger in self._strangers.values():
            stranger.link.close()
        self._selector.close()
        if refusal:
            for link in links.values():
                link.close()
        return links

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:
            return
        if len(self._strangers) >= MOST_STRANGERS:
            self._drop(next(iter(self._strangers.values())), "said nothing, and others wait")
        keep_alive(sock)
        try:
            stranger = _Stranger(sock, _text(address))
        except LinkError:
            sock.close()
            return
        self._strangers[sock.fileno()] = stranger
        self._selector.register(stranger.link, selectors.EVENT_READ, stranger)

    def _read(self, stranger: _Stranger) -> None:
        try:
            message = stranger.link.poll()
        except LinkError as error:
            self._drop(stranger, str(error))
            return
        if message is None:
            return
        if stranger.link.fileno() not in self._strangers:
            self._drop(stranger, "spoke before it was answered")
        elif not message.startswith(MAGIC[:11]):
            self._drop(stranger, "is no rank of Quire")
        else:
            self._admit(stranger, message)

    def _admit(self, stranger: _Stranger, message: bytes) -> None:
        """Raises `ConfigError` if a rank has come that does not fit."""
        peer = stranger.link.peer
        head = len(MAGIC)
        stranger.theirs = message[head : head + NONCE]
        mac, text = message[head + NONCE : head + NONCE + MAC], message[head + NONCE + MAC :]
        wrong = ""
        hello = None
        if not message.startswith(MAGIC):
            wrong = f"{peer} has another version of Quire's links; install the same version on every node."
        elif self._refusal:
            wrong = self._refusal
        elif not hmac.compare_digest(
            mac, proof(self._key, b"rank", stranger.ours, stranger.theirs, text)
        ):
            wrong = f"{peer} has another key than this node; set {KEY_VARIABLE} to the same text on each."
        else:
            try:
                hello = msgspec.json.decode(text, type=_Hello)
            except msgspec.DecodeError as error:
                wrong = f"{peer} sent a wrong hello: {error}."
        if hello is not None:
            if hello.rank in self._accepted:
                self._read(
                    self._accepted[hello.rank]
                )  # it may have ended, and this be its next start
            wrong = self._misfit(hello)
        if wrong or hello is None:
            self._answer(stranger, wrong)
            self._drop(stranger, "")
            self._refused += 1
            if self._refusal:
                return
            raise ConfigError(wrong)
        del self._strangers[stranger.link.fileno()]
        self._accepted[hello.rank] = stranger

    def _misfit(self, hello: _Hello) -> str:
        names = dict.fromkeys([*self._facts, *hello.facts])
        pairs = {name: (hello.facts.get(name), self._facts.get(name)) for name in names}
        others = [
            f"{name} is {theirs!r}, not {ours!r}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
        if others:
            return (
                f"Rank {hello.rank} does not fit the first node: {'; '.join(others)}. Start every node "
                "with the same options, files and version."
            )
        if hello.rank not in self._ranks:
            return f"Rank {hello.rank} is not expected; the first node waits for {sorted(self._ranks)}."
        if hello.rank in self._accepted:
            return f"Rank {hello.rank} has connected twice; give every node a node_rank of its own."
        return ""

    def _answer(self, stranger: _Stranger, refusal: str) -> None:
        text = refusal.encode()[: HELLO_BYTES - MAC]
        mac = proof(self._key, b"first", stranger.ours, stranger.theirs, text)
        try:
            stranger.link.send(mac + text)
        except LinkError as error:
            logger.warning("%s", error)

    def _drop(self, stranger: _Stranger, why: str) -> None:
        if why:
            logger.warning("closed a connection from %s: %s", stranger.link.peer, why)
        self._selector.unregister(stranger.link)
        self._strangers.pop(stranger.link.fileno(), None)
        self._accepted = {r: s for r, s in self._accepted.items() if s is not stranger}
        stranger.link.close()


def connect(
    address: str, port: int, key: bytes, facts: Facts, rank: int, *, timeout: float
) -> Link:
    """The link of this rank to the first machine, when all ranks have come; it may start later than
    this. Raises `ConfigError` after `timeout` seconds, or if this rank, or another one, does not fit."""
    require_key(address, key)
    deadline = time.monotonic() + timeout
    where = f"{address}:{port}"
    link = Link(_connected(address, port, deadline), f"rank 0 ({where})", max_bytes=HELLO_BYTES)
    link.reads_ahead = False  # what follows the hello may be another process's
    try:
        challenge = link.receive(timeout=min(HELLO_SECONDS, timeout))
        if challenge is None or challenge[:-NONCE] != MAGIC:
            raise ConfigError(
                f"{where} does not answer as this version of Quire; check master_addr and master_port."
            )
        theirs, ours = challenge[len(MAGIC) :], os.urandom(NONCE)
        text = msgspec.json.encode(_Hello(rank, dict(facts)))
        link.send(MAGIC + ours + proof(key, b"rank", theirs, ours, text) + text)
        answer = link.receive(timeout=max(0.0, deadline - time.monotonic()))
    except LinkError as error:
        link.close()
        raise ConfigError(f"The first node refused rank {rank}, or ended: {error}") from error
    except ConfigError:
        link.close()
        raise
    refusal = _refusal(answer, key, theirs, ours, where)
    if refusal:
        link.close()
        raise ConfigError(refusal)
    link.max_bytes, link.reads_ahead = MAX_BYTES, True
    return link


def _refusal(answer: bytes | None, key: bytes, theirs: bytes, ours: bytes, where: str) -> str:
    if answer is None:
        return f"Not all ranks have connected to {where} in time; start every node."
    mac, text = answer[:MAC], answer[MAC:]
    if not hmac.compare_digest(mac, proof(key, b"first", theirs, ours, text)):
        return (
            f"{where} has another key than this node; set {KEY_VARIABLE} to the same text on each."
        )
    return text.decode(errors="replace")


def _connected(address: str, port: int, deadline: float) -> socket.socket:
    while True:
        left = deadline - time.monotonic()
        try:
            sock = socket.create_connection((address, port), timeout=max(0.1, min(left, 5)))
        except OSError as error:
            if left <= RETRY_SECONDS:
                raise ConfigError(
                    f"No first node at {address}:{port}: {error.strerror or error}. Start it with node_rank "
                    "0, or correct master_addr and master_port."
                ) from error
            time.sleep(RETRY_SECONDS)
        else:
            keep_alive(sock)
            return sock


def keep_alive(sock: socket.socket) -> None:
    """Small messages leave at once; a machine that is gone without a word is noticed in about 20 s."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 20_000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def proof(key: bytes, *parts: bytes) -> bytes:
    """Only the last part's length varies."""
    return hmac.digest(key, b"\0".join(parts), "sha256")


def _resolve(address: str, port: int) -> list[tuple]:
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{address!r} is no address: {error.strerror}.") from error


def _text(address: tuple) -> str:
    return f"{address[0]}:{address[1]}"

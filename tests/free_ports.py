"""Ports for servers that tests start, and whose number they must know before."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

_ports = itertools.count(20_000 + os.getpid() * 97 % 8000, 4)
"""Linux gives those from 32,768 on to connections, which may take one between its choice and its use."""


def free_ports(count: int) -> int:
    """The first of up to four free ports in a row."""
    for port in itertools.islice(_ports, 1000):
        with suppress(OSError):
            for offset in range(count):
                socket.create_server(("127.0.0.1", port + offset)).close()
            return port
    raise AssertionError("no free ports")


def free_port() -> int:
    return free_ports(1)

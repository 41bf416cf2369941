"""The HTTP servers of a process: the API's, and that of the admin endpoints if it has a listener of its own.
They start, drain and close as one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from quire.config import ServerConfig
from quire.server.app import build_admin_app, build_app
from quire.server.auth import check_admin, exposure
from quire.server.keys import Keys, configured_admin_keys
from quire.server.process import HttpServer, bind, bind_admin, http_server, url_of
from quire.server.state import ServerState


@dataclass(frozen=True, slots=True)
class Listener:
    socket: socket.socket
    server: HttpServer
    url: str


class Listeners:
    def __init__(self, api: Listener, admin: Listener | None, warning: str | None) -> None:
        self.api, self.admin = api, admin
        self.warning = warning
        """That other machines can reach the API without a key."""
        self._all = [api] if admin is None else [api, admin]

    async def run(self) -> None:
        """Serve until `stop`, or until one of them has ended. Raises what a server raised."""
        tasks = [asyncio.create_task(one.server.serve(sockets=[one.socket])) for one in self._all]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.stop()
        await asyncio.wait(tasks)
        for task in tasks:
            task.result()

    async def wait_started(self, running: asyncio.Task[None]) -> None:
        for one in self._all:
            await one.server.wait_started(running)

    def close_connections(self, *, idle: bool) -> None:
        """See `HttpServer.close_connections`."""
        for one in self._all:
            one.server.close_connections(idle=idle)

    def stop(self) -> None:
        for one in self._all:
            one.server.should_exit = True


@contextmanager
def open_listeners(
    config: ServerConfig, state: ServerState, keys: Keys, environ: Mapping[str, str]
) -> Iterator[Listeners]:
    """Bound, and not serving yet. Raises `ConfigError` for an address, key or certificate that cannot be
    used."""
    admin_keys = configured_admin_keys(config, environ, keys)
    app = build_app(state, api_keys=keys, admin_keys=admin_keys)
    server = http_server(app, config)
    with ExitStack() as stack:
        bound = stack.enter_context(_held(bind(config)))
        api = Listener(bound, server, url_of(bound, config))
        warning = exposure(bound, config, keys, admin_keys)
        admin = None
        if config.has_admin_listener:
            server = http_server(build_admin_app(state, admin_keys=admin_keys), config)
            bound = stack.enter_context(_held(bind_admin(config)))
            check_admin(bound, config, admin_keys)
            admin = Listener(bound, server, url_of(bound, config))
        yield Listeners(api, admin, warning)


@contextmanager
def _held(bound: socket.socket) -> Iterator[socket.socket]:
    """In the end it is closed, and a Unix socket's file is removed."""
    path = bound.getsockname() if bound.family == socket.AF_UNIX else None
    with contextlib.closing(bound):
        try:
            yield bound
        finally:
            if path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)

"""uvicorn, with our own signal handling, limited request heads and our own sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from quire.config import ServerConfig
from quire.config.server import ADMIN_PORT
from quire.errors import ConfigError
from quire.server.auth import OPEN_PATHS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from quire.server.middleware import App

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""
CLOSE_SECONDS = 3
"""Seconds for connections to close after the last answer."""


class _NotAbout(logging.Filter):
    """Drops log lines of probes and of given paths: they are requested every few seconds.

    uvicorn's record has args (client, method, path with query, version, status).
    """

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if not isinstance(args, tuple) or len(args) < 3:
            return True
        return str(args[2]).partition("?")[0] not in self._paths


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers: on a signal, `run` drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def close_connections(self, *, idle: bool) -> None:
        """From now on an answer that begins says that its connection closes after it. idle: all others close
        too, those that wait for nothing at once.

        Until then a connection whose answer has begun stays: its client was not told, and might send a
        request just as it closes. The answer to that one will say so."""
        close = (b"connection", b"close")
        if close not in self.config.encoded_headers:
            self.config.encoded_headers.append(close)
            self.server_state.default_headers = [*self.server_state.default_headers, close]
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if idle or (cycle is not None and not cycle.response_started):
                connection.shutdown()

    async def wait_started(self, task: asyncio.Task[None]) -> None:
        while not self.started and not task.done():
            await asyncio.sleep(0.01)


def http_server(app: FastAPI | App, config: ServerConfig) -> HttpServer:
    """Raises `ConfigError` if TLS files cannot be read."""
    options = uvicorn.Config(
        app,
        http=_http_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=config.uvicorn_log_level,
        access_log=not config.disable_uvicorn_access_log,
        server_header=False,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    try:
        options.load()
    except OSError as error:
        raise ConfigError(
            f"TLS: {config.ssl_certfile} / {config.ssl_keyfile} cannot be used "
            f"({error.strerror or 'not a certificate and its key'})."
        ) from None
    paths = (config.disable_access_log_for_endpoints or "").split(",")
    unlogged = OPEN_PATHS | {"/debug/state"} | {path.strip() for path in paths if path.strip()}
    logging.getLogger("uvicorn.access").filters[:] = [_NotAbout(unlogged)]
    return HttpServer(options)


def _http_protocol() -> type[asyncio.Protocol] | str:
    """httptools if installed, else h11. httptools, unlike h11, has no limit on a request's head. A client
    could fill the memory with an endless header (CVE-2025-48956), so its bytes are counted."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class BoundedHttpTools(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = True
        _ended = False
        """Whether a message ended in the current piece of data: then not all of the piece is a head."""

        def on_message_begin(self) -> None:
            self._head_bytes, self._in_head = 0, True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            self._ended = False
            super().data_received(data)
            if self._in_head and not self._ended and not self.transport.is_closing():
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self.logger.warning("Request head too large.")
                    self.send_400_response("Request head too large.")

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._head_bytes, self._in_head, self._ended = 0, True, True

    return BoundedHttpTools


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket. Bound before the model is loaded, so that a port in use is reported at once.

    Raises `ConfigError` naming the address.
    """
    if config.uds is not None:
        return _bind_unix(config.uds)
    return _bind_tcp(config.host or "0.0.0.0", config.port, "")


def bind_admin(config: ServerConfig) -> socket.socket:
    """The admin listener's socket. Raises `ConfigError` naming the address."""
    if config.admin_uds is not None:
        return _bind_unix(config.admin_uds, private=True)
    port = ADMIN_PORT if config.admin_port is None else config.admin_port
    return _bind_tcp(config.admin_host or "127.0.0.1", port, "admin-")


def _bind_tcp(host: str, port: int, prefix: str) -> socket.socket:
    """prefix: of the options, for the error."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Set explicitly: asyncio turns off Nagle's algorithm only for sockets with the protocol number of TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --{prefix}port "
            f"(0 picks a free one) or --{prefix}host."
        ) from None
    listener.set_inheritable(False)
    return listener


def _bind_unix(path: str, *, private: bool = False) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(
            path
        )  # nobody connects before it listens, so it may be made private after this
        if private:
            os.chmod(path, 0o600)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on unix socket {path}: {error.strerror}.") from None
    return listener


def _remove_stale(path: str) -> None:
    """Unlink a socket on which no process listens, and nothing else."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) != 0:
            os.unlink(path)


def url_of(listener: socket.socket, config: ServerConfig) -> str:
    """The URL for clients, with the port that was chosen."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.ssl_certfile else 'http'}://{shown}:{port}"

"""API keys: every path needs one, except the probes and the pages, which ask for the key. Admin
paths need an admin key where there is one.

The check reads `scope["path"]`, as the router does, and not a URL rebuilt from the Host header. So the
check and the router always see the same path, also for `http://x/health?@host/v1/...` (CVE-2026-48746).
"""

from __future__ import annotations

import re
import socket
import ssl
from ipaddress import IPv6Address, ip_address

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.server.errors import ApiError, routed_path, speaks_anthropic
from quire.server.keys import ADMIN_ENVIRONMENT, ENVIRONMENT, Keys
from quire.server.middleware import (
    App,
    Receive,
    Scope,
    Send,
    header_values,
    send_error,
    set_key,
)

METRICS = "/metrics"
DASHBOARD = "/dashboard"
DEBUG = "/debug/"
"""All paths that begin so are for operators."""
PROBES = frozenset({"/health", "/ready", "/ping", "/version"})
OPEN_PATHS = PROBES | {"/", METRICS, DASHBOARD}
NO_KEYS = Keys()

_BODY = b'{"error":"Unauthorized"}'


def exposure(
    listener: socket.socket, config: ServerConfig, keys: Keys, admin_keys: Keys = NO_KEYS
) -> str | None:
    """A warning if other machines can reach the API's `listener`, which is bound, and need no key; else
    None."""
    where = None if keys else _beyond_this_machine(listener, config)
    if where is None:
        return None
    open_admin = config.enable_admin_endpoints and not config.has_admin_listener and not admin_keys
    admin = ", use the admin endpoints" if open_admin else ""
    read, and_metrics = (
        ("", "") if config.admin_metrics else (" and read /metrics", " and /metrics")
    )
    return (
        f"the server listens beyond this machine, on {where}, without an API key: whoever reaches it may "
        f"send requests{admin}{read}. To serve this machine alone, set --host 127.0.0.1. To "
        f"require a key, set --api-key or {ENVIRONMENT[0]} (probes{and_metrics} need none)."
    )


def check_admin(listener: socket.socket, config: ServerConfig, admin_keys: Keys) -> None:
    """Raises `ConfigError` if other machines can reach the admin listener and need no key. At the API this is
    a warning, because scripts written for vLLM rely on it."""
    where = None if admin_keys else _beyond_this_machine(listener, config)
    if where is not None:
        raise ConfigError(
            f"the admin endpoints would listen beyond this machine, on {where}, without a key. Set "
            f"--admin-api-key or {ADMIN_ENVIRONMENT}, or leave --admin-host out for 127.0.0.1."
        )


def _beyond_this_machine(listener: socket.socket, config: ServerConfig) -> str | None:
    """The address of `listener`, which is bound, if other machines can reach it without a certificate.

    The bound address decides, so a host name counts as the address that it resolved to. A Unix socket and
    a server that requires client certificates are not exposed.
    """
    if listener.family == socket.AF_UNIX or _demands_certificates(config):
        return None
    host, port = listener.getsockname()[:2]
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return None
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port}" + (" (every interface)" if address.is_unspecified else "")


def _demands_certificates(config: ServerConfig) -> bool:
    return config.ssl_certfile is not None and config.ssl_cert_reqs == ssl.CERT_REQUIRED


class ApiKeyAuth:
    """401 unless the request brings one of the keys, as `Authorization: Bearer KEY` or (Anthropic's clients)
    as `X-Api-Key: KEY`. If it brings two, one must be right, and the first right one says whose it is."""

    def __init__(
        self,
        app: App,
        *,
        open_paths: frozenset[str],
        keys: Keys = NO_KEYS,
        admin_keys: Keys = NO_KEYS,
        admin_paths: frozenset[str] | None,
    ) -> None:
        """admin_paths: those that need one of `admin_keys`, if there are any, beside `DEBUG`. None is
        all."""
        self._app, self._keys, self._admin_keys = app, keys, admin_keys
        self._open_paths, self._admin_paths = open_paths, admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may(scope):
            await self._app(scope, receive, send)
            return
        body = _BODY
        if speaks_anthropic(scope):
            body = ApiError(401, "The API key is missing or wrong.").body(scope)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _may(self, scope: Scope) -> bool:
        """Compares the exact path that the router sees."""
        path = routed_path(scope)
        if path in self._open_paths:
            return True
        is_admin = self._admin_paths is None or path in self._admin_paths or path.startswith(DEBUG)
        keys = self._admin_keys if is_admin and self._admin_keys else self._keys
        if not keys:
            return True
        found = [key for token in _tokens(scope) if (key := keys.find(token)) is not None]
        if found and keys is self._keys:
            set_key(scope, found[0])
        return bool(found)


class NotFromBrowsers:
    """403 for what a web page makes a browser on this machine send: a request with an Origin, or one with a
    host name that an attacker's DNS lets point to this machine. For a listener without keys."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app, self._names = app, {"localhost", (config.admin_host or "localhost").lower()}
        self._by_any_name = config.admin_uds is not None or _demands_certificates(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may(scope):
            await send_error(ApiError(403, "Not for web pages."), scope, send)
            return
        await self._app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        if header_values(scope, b"origin"):
            return False
        return self._by_any_name or _has_host(scope, self._names)


def is_from_this_machine(scope: Scope) -> bool:
    """Whether a program on this machine asks, over TCP: not a proxy that says for whom, nor a web page of
    somebody else (see `NotFromBrowsers`)."""
    address, *_ = scope.get("client") or ("",)
    told = (b"origin", b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
    return (
        _is_address(address, loopback=True)
        and not any(header_values(scope, name) for name in told)
        and _has_host(scope, {"localhost"})
    )


def _has_host(scope: Scope, names: set[str]) -> bool:
    """Whether the host is one of `names`, or an address, which no DNS can point elsewhere."""
    hosts = header_values(scope, b"host")
    if len(hosts) != 1:
        return False
    name = re.sub(r":[0-9]{1,5}\Z", "", hosts[0].decode("latin-1")).lower()
    return name in names or _is_address(
        name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name
    )


def _is_address(text: str, *, loopback: bool = False) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or not loopback


def _tokens(scope: Scope) -> list[bytes]:
    """The keys in the headers. A header that was sent twice is ambiguous and gives none."""
    tokens = header_values(scope, b"x-api-key")
    tokens = tokens if len(tokens) == 1 else []
    bearer = header_values(scope, b"authorization")
    if len(bearer) == 1:
        scheme, _, token = bearer[0].partition(b" ")
        if scheme.lower() == b"bearer":
            tokens.append(token)
    return [token.strip() for token in tokens]

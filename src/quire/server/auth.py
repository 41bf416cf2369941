"""API keys: every path needs one, except the probes and the playground's page, which asks for the key.

The check reads `scope["path"]`, as the router does, and not a URL rebuilt from the Host header. So the
check and the router always see the same path, also for `http://x/health?@host/v1/...` (CVE-2026-48746).
"""

from __future__ import annotations

import socket
import ssl
from ipaddress import IPv6Address, ip_address

from quire.config import ServerConfig
from quire.server.errors import ApiError, routed_path, speaks_anthropic
from quire.server.keys import ENVIRONMENT, Keys
from quire.server.middleware import App, Receive, Scope, Send, header_values, set_key

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/ping", "/metrics", "/version"})

_BODY = b'{"error":"Unauthorized"}'


def exposure(listener: socket.socket, config: ServerConfig, keys: Keys) -> str | None:
    """A warning if other machines can reach `listener`, which is bound, and need no key; else None.

    The bound address decides, so a host name counts as the address that it resolved to. A Unix socket and
    a server that requires client certificates are not exposed.
    """
    demands_certificates = config.ssl_certfile and config.ssl_cert_reqs == ssl.CERT_REQUIRED
    if keys or listener.family == socket.AF_UNIX or demands_certificates:
        return None
    host, port = listener.getsockname()[:2]
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return None
    shown = f"[{host}]" if ":" in host else host
    where = f"{shown}:{port}" + (" (every interface)" if address.is_unspecified else "")
    admin = ", use the admin endpoints" if config.enable_admin_endpoints else ""
    return (
        f"the server listens beyond this machine, on {where}, without an API key: whoever reaches it may "
        f"send requests{admin} and read /metrics. To serve this machine alone, set --host 127.0.0.1. To "
        f"require a key, set --api-key or {ENVIRONMENT[0]} (probes and /metrics need none)."
    )


class ApiKeyAuth:
    """401 unless the request brings one of the keys, as `Authorization: Bearer KEY` or (Anthropic's clients)
    as `X-Api-Key: KEY`. If it brings two, one must be right, and the first right one says whose it is."""

    def __init__(self, app: App, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope) or self._is_known(scope):
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

    def _is_known(self, scope: Scope) -> bool:
        found = [key for token in _tokens(scope) if (key := self._keys.find(token)) is not None]
        if found:
            set_key(scope, found[0])
        return bool(found)


def is_open(scope: Scope) -> bool:
    """Whether the route needs no key. Compares the exact path that the router sees."""
    return routed_path(scope) in OPEN_PATHS


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

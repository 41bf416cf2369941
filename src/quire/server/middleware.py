"""The middleware, outermost first: id and metrics, CORS, API key, body limit.

All of it is plain ASGI. Starlette's BaseHTTPMiddleware runs the app in its own task group, which delays
each streamed chunk and hides the client's disconnect from the endpoint.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from quire.server.errors import ApiError, internal_error
from quire.server.keys import Key, Tenant
from quire.server.live import ClientGoneError
from quire.server.load_header import load_header
from quire.server.record import GENERATING, Record
from quire.server.state import ServerState

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_REQUEST_ID_CHARS = 128
_ID_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:")
STATUS_CLIENT_GONE = 499
ENGINE_ID = b"x-quire-request-id"
MOST_ENGINE_IDS = 64
"""In the header."""


class RequestContext:
    """Gives each request an id, counts it, and answers uncaught exceptions with a fixed 500.

    A client's X-Request-Id is returned if it is short and plain, for the client's logs and ours. It is
    never used as a key (PYSEC-2026-4198).
    """

    def __init__(self, app: App, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._root_path = state.config.root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # not supported, and it must not pass the key check
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:  # the router and the key check remove it from paths that have it
            scope["root_path"] = self._root_path
        request_id = _client_request_id(scope) or secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        record = scope["state"]["record"] = self._state.new_record(scope.get("headers", ()))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = request_id_of(scope).encode("ascii")
                headers = message["headers"] = list(message.get("headers", ()))
                headers.append((b"x-request-id", header))
                if ids := record.engine_ids:
                    headers.append((ENGINE_ID, _listed(ids)))
                if (tenant := tenant_of(scope)) is not None and status < 400:
                    limits = tenant.quotas.headers()
                    headers += [(k.encode(), v.encode()) for k, v in limits.items()]
                if (engine := self._state.engine) is not None and _route(scope) in GENERATING:
                    headers += load_header(record.headers, engine.stats)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            status = status or STATUS_CLIENT_GONE
        except Exception:
            logger.exception("request %s: unexpected error", request_id_of(scope))
            if status == 0:
                await send_error(internal_error(request_id_of(scope)), scope, send_with_id)
        finally:
            status = status or STATUS_CLIENT_GONE
            self._state.http_metrics.on_response(
                method=scope["method"],
                handler=_route(scope),
                status=status,
                seconds=time.monotonic() - record.arrival_ts,
            )
            if scope["method"] == "POST":
                record.request_id, record.route = request_id_of(scope), _route(scope) or ""
                record.close(status)


class BodyLimit:
    """Limits the body while it arrives, even if its length was not announced."""

    def __init__(self, app: App, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header_values(scope, b"content-length")
        if announced and announced[0].isdigit() and int(announced[0][:19]) > self._limit:
            await send_error(self._too_large(), scope, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than this server takes: {self._limit} bytes (--max-body-bytes).",
            param="body",
        )


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    body = error.body(scope)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        *((k.encode("latin-1"), v.encode("latin-1")) for k, v in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _listed(ids: Sequence[int]) -> bytes:
    """`r17, r18`."""
    more = ", ..." if len(ids) > MOST_ENGINE_IDS else ""
    return (", ".join(f"r{each}" for each in ids[:MOST_ENGINE_IDS]) + more).encode("ascii")


def request_id_of(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", "unknown"))


def _route(scope: Scope) -> str | None:
    """The path of the route that serves the request; None until there is one."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else None


def record_of(scope: Scope) -> Record:
    """A new one outside of the middleware."""
    record = scope.get("state", {}).get("record")
    return record if isinstance(record, Record) else Record(scope.get("headers", ()))


def set_key(scope: Scope, key: Key) -> None:
    scope.setdefault("state", {})["tenant"] = key.tenant
    record = record_of(scope)
    record.tenant, record.key_id = key.tenant.name, key.id


def tenant_of(scope: Scope) -> Tenant | None:
    """Whose key the request has brought; None if the server has no keys."""
    tenant = scope.get("state", {}).get("tenant")
    return tenant if isinstance(tenant, Tenant) else None


def owner_of(scope: Scope) -> bytes | None:
    """Who may see and abort what the request makes; None if the server has no keys."""
    tenant = tenant_of(scope)
    return None if tenant is None else tenant.owner


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope.get("headers", ()) if key == name]


def adopt_request_id(scope: Scope, value: object) -> None:
    """Use the body's `request_id` as the request's id if the header was not sent."""
    if isinstance(value, str) and _is_plain(value) and _client_request_id(scope) is None:
        scope["state"]["request_id"] = value


def _client_request_id(scope: Scope) -> str | None:
    values = header_values(scope, b"x-request-id")
    text = values[0].decode("latin-1") if len(values) == 1 else ""
    return text if _is_plain(text) else None


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= MAX_REQUEST_ID_CHARS and _ID_CHARS.issuperset(text)

"""The FastAPI application. It is built before the engine is loaded, so that probes are answered at once.
Endpoints ask `ServerState` for the engine, which raises a 503 until it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.errors import QuireError
from quire.metrics.key_metrics import KeyMetrics
from quire.server.admin import admin_router, local_router, requests_router
from quire.server.anthropic_api import messages_router
from quire.server.auth import (
    DASHBOARD,
    METRICS,
    OPEN_PATHS,
    PROBES,
    ApiKeyAuth,
    NotFromBrowsers,
)
from quire.server.chat import chat_router
from quire.server.chat_batch import chat_batch_router
from quire.server.completions import completions_router
from quire.server.embeddings import embeddings_router
from quire.server.errors import ApiError, to_api_error
from quire.server.keys import Keys
from quire.server.live import ClientGoneError
from quire.server.middleware import (
    STATUS_CLIENT_GONE,
    BodyLimit,
    RequestContext,
    request_id_of,
)
from quire.server.openapi import install_openapi
from quire.server.playground import playground_router
from quire.server.probes import metrics_router, probes_router
from quire.server.responses_api import responses_router
from quire.server.scoring import scoring_router
from quire.server.state import ServerState
from quire.server.tokens import models_router, tokens_router
from quire.util.version import VERSION

EXPOSED_HEADERS = (
    "x-request-id", "x-quire-request-id", "x-quire-warnings", "endpoint-load-metrics",
    "retry-after", "retry-after-ms",
    "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
)  # fmt: skip


def build_app(
    state: ServerState,
    *,
    api_keys: Keys | Sequence[str] = (),
    admin_keys: Keys | Sequence[str] = (),
) -> FastAPI:
    """The API over `state`. With `api_keys`, every path except the probes and the pages needs
    one of them. It has the admin endpoints if they are enabled and have no listener of their own; with
    `admin_keys` they need one of those, and no other will do."""
    config = state.config
    app = _new_app(state, None if config.disable_fastapi_docs else "/openapi.json")
    for router in (
        completions_router(state),
        chat_router(state),
        chat_batch_router(state),
        responses_router(state),
        messages_router(state),
        embeddings_router(state),
        scoring_router(state),
        models_router(state),
        tokens_router(state),
        probes_router(state),
        requests_router(state),
    ):
        app.include_router(router)
    if not config.admin_metrics:
        app.include_router(metrics_router(state))
    admin_paths: frozenset[str] = frozenset()
    if config.enable_admin_endpoints and not config.has_admin_listener:
        admin = admin_router(state)
        admin_paths = frozenset(route.path for route in admin.routes if isinstance(route, Route))
        app.include_router(admin)
    keys = _as_keys(api_keys)
    if not (admin_paths or keys or config.has_admin_listener):
        app.include_router(local_router(state))
    if not config.disable_playground:
        app.include_router(playground_router())
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(
        ApiKeyAuth,
        keys=keys,
        open_paths=OPEN_PATHS - ({METRICS} if config.admin_metrics else set()),
        admin_keys=_as_keys(admin_keys),
        admin_paths=admin_paths,
    )
    if keys:
        state.registry.register(KeyMetrics(keys))
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestContext, state=state)
    install_openapi(app)
    return app


def build_admin_app(state: ServerState, *, admin_keys: Keys | Sequence[str] = ()) -> FastAPI:
    """The app of the admin listener. With `admin_keys` every path except the probes needs one of them.
    Without, who reaches the listener may use everything, and web pages are kept away."""
    app = _new_app(state, None)
    for router in (
        admin_router(state),
        requests_router(state, of_all=True),
        probes_router(state),
        metrics_router(state),
    ):
        app.include_router(router)
    keys = _as_keys(admin_keys)
    app.add_middleware(BodyLimit, limit=state.config.max_body_bytes)
    app.add_middleware(
        ApiKeyAuth, admin_keys=keys, admin_paths=None, open_paths=PROBES | {DASHBOARD}
    )
    if not keys:
        app.add_middleware(NotFromBrowsers, config=state.config)
    app.add_middleware(RequestContext, state=state)
    return app


def _new_app(state: ServerState, openapi_url: str | None) -> FastAPI:
    app = FastAPI(title="Quire", version=VERSION, redirect_slashes=False, openapi_url=openapi_url)
    app.state.strict_requests = state.config.strict_requests
    app.add_exception_handler(QuireError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    return app


def _as_keys(keys: Keys | Sequence[str]) -> Keys:
    return keys if isinstance(keys, Keys) else Keys(keys)


async def _on_error(request: Request, error: Exception) -> Response:
    answer = to_api_error(error, request_id_of(request.scope))
    return Response(
        answer.body(request.scope),
        status_code=answer.status,
        media_type="application/json",
        headers=answer.headers,
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown route or method: FastAPI's own body, which scripts expect, merged with the dialect's."""
    if not isinstance(error, HTTPException):
        raise error
    phrase = HTTPStatus(error.status_code).phrase
    answer = ApiError(error.status_code, phrase)
    body = msgspec.json.decode(answer.body(request.scope))
    return Response(
        msgspec.json.encode({"detail": phrase} | body),
        status_code=error.status_code,
        media_type="application/json",
        headers=error.headers,
    )


async def _on_client_gone(request: Request, error: Exception) -> Response:
    """The client has gone and does not read this. The status is for logs and metrics."""
    return Response(status_code=STATUS_CLIENT_GONE)

"""Probes for operators and load balancers: alive, ready, version, metrics. None needs a key at the API's
listener."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from quire.metrics import render
from quire.server.engine_protocol import SleepingEngine
from quire.server.errors import RETRY_AFTER_LOADING
from quire.server.state import Phase, ServerState
from quire.util.version import VERSION


def probes_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Whether the engine's loop has made progress lately; that the process exists is not enough."""
        return _answer(*check_health(state))

    @router.get("/ready")
    async def ready() -> Response:
        """Whether to send requests here: the engine is loaded and awake, and not draining. A full queue
        does not count: under overload all replicas would be taken out at once, and clients would get
        refused connections instead of 429 with Retry-After."""
        if isinstance(state.engine, SleepingEngine) and state.engine.is_sleeping:
            return _answer(False, {"status": "sleeping"})
        return _answer(state.phase is Phase.READY, {"status": state.phase.value})

    @router.get("/ping")
    @router.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """/health under the name that SageMaker asks for."""
        return _answer(*check_health(state))

    @router.get("/version")
    async def version() -> Response:
        """Quire's version."""
        return _answer(True, {"version": VERSION})

    return router


def metrics_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        body, content_type = render(state.registry)
        return Response(body, headers={"content-type": content_type})

    return router


Body = Mapping[str, str | float | Sequence[str]]


def check_health(state: ServerState) -> tuple[bool, Body]:
    """(healthy, body). A draining server is alive; a loading one is not yet. One of several engine cores is
    enough: the body says that it is degraded."""
    if state.phase is Phase.FAILED:
        return False, {"status": "failed", "reason": "the engine has stopped"}
    if state.engine is None:
        return False, {"status": state.phase.value}
    if state.engine.is_dead:
        return False, {"status": "failed", "reason": "the engine has stopped"}
    health = state.engine.health(state.config.health_timeout)
    age = round(health.heartbeat_age, 3)
    if not health.alive:
        return False, {"status": "stalled", "heartbeat_age": age}
    if len(health.replicas) < 2:
        return True, {"status": "ok", "heartbeat_age": age}
    status = "ok" if set(health.replicas) == {"ok"} else "degraded"
    return True, {"status": status, "heartbeat_age": age, "replicas": health.replicas}


def _answer(good: bool, body: Body) -> Response:
    headers = {"cache-control": "no-store"}
    if not good:
        headers["retry-after"] = str(RETRY_AFTER_LOADING)
    return Response(
        msgspec.json.encode(body),
        status_code=200 if good else 503,
        media_type="application/json",
        headers=headers,
    )

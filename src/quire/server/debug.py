"""Explanations and timelines over HTTP, for operators (`explanations.py`)."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from quire.scheduler.explain import summary
from quire.scheduler.timeline import timeline
from quire.server.errors import ApiError, bad_request
from quire.server.explanations import MOST_KNOWN, explained, histories, names
from quire.server.state import ServerState

MOST_SUMMARIZED = 20


def debug_router(state: ServerState) -> APIRouter:
    """Below `/debug/`, which needs an admin key wherever it is served."""
    router = APIRouter()

    @router.get("/debug/requests")
    async def slow_requests() -> Response:
        """The requests in the decision record that waited longest for their first token, with explanations,
        and what all waited for."""
        found = await histories(state.loaded_engine())
        return _json(await asyncio.to_thread(summary, found, MOST_SUMMARIZED))

    @router.get("/debug/requests/{id}")
    async def explain_request(id: str) -> Response:  # noqa: A002 (its name in the path)
        """Why a request took the time that it took: sentences, and the facts. id: `r17` or `17` (the answer's
        `x-quire-request-id`), the client's `x-request-id`, or the answer's id."""
        ids = state.explanations.ids_of(id)
        if not ids:
            raise ApiError(404, f"None of the last {MOST_KNOWN} requests has this id.", param="id")
        found = await explained(state.loaded_engine(), ids)
        if not found:
            raise ApiError(
                404,
                f"The decision record has nothing of {', '.join(names(ids[:8]))}: it has not reached the "
                "scheduler, or the record holds only later steps (--decision-record-bytes), or the engine "
                "core has been started again since.",
                param="id",
            )
        return _json({"requests": [each.entry(replica) for replica, each in found]})

    @router.get("/debug/timeline")
    async def show_timeline(seconds: str | None = None) -> Response:
        """The decision record as Chrome's trace events, for https://ui.perfetto.dev. `seconds`: the last ones
        only."""
        try:
            last = None if seconds is None else float(seconds)
        except ValueError:
            last = -1.0
        if last is not None and not 0.0 < last < float("inf"):
            raise bad_request("seconds must be a positive number.", param="seconds")
        found = await histories(state.loaded_engine())
        drawn = await asyncio.to_thread(timeline, found, seconds=last)
        return _json(drawn)

    return router


def _json(body: object) -> Response:
    return Response(
        msgspec.json.encode(body),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )

"""Why a request took so long, for operators: explanations and timelines over HTTP, and in the log of requests
that were slower than they should be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire.config import ServerConfig
from quire.scheduler.explain import explain, parse_id, summary
from quire.scheduler.explanation import Explanation
from quire.scheduler.history import History
from quire.scheduler.record_reader import read
from quire.scheduler.timeline import timeline
from quire.server.engine_protocol import RecordingEngine, ServingEngine
from quire.server.errors import ApiError, bad_request
from quire.server.record import Record

if TYPE_CHECKING:
    from quire.server.state import ServerState

logger = logging.getLogger(__name__)

MOST_KNOWN = 16_384
"""Requests whose ids are remembered."""
LOG_SECONDS = 10.0
"""The least time between two slow requests that are logged."""
MOST_SUMMARIZED = 20


@dataclass(frozen=True, slots=True)
class Known:
    request_id: str
    """The client's, or ours."""
    answer_id: str
    ids: tuple[int, ...]
    """In the engine."""


class Explanations:
    """Finds requests by any of their ids, and logs slow ones."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._known: deque[Known] = deque(maxlen=MOST_KNOWN)
        self._logged, self._num_unlogged = 0.0, 0
        self._tasks: set[asyncio.Task[None]] = set()

    def submitted(self, record: Record, request_id: str) -> None:
        if record.engine_ids:
            self._known.append(Known(request_id, record.answer_id or "", record.engine_ids))

    def ids_of(self, text: str) -> list[int]:
        """The engine's ids of what this names: `r17`, `17`, or what the client sent or got as an id. Several
        requests may have come with one id."""
        number = parse_id(text)
        named = [each.ids for each in self._known if text in (each.request_id, each.answer_id)]
        return [each for ids in named for each in ids] or ([] if number is None else [number])

    # --- slow requests ----------------------------------------------------------------------------

    def ended(self, record: Record, engine: ServingEngine | None) -> None:
        """Called in the event loop."""
        why = self.why_slow(record)
        if why is None or not isinstance(engine, RecordingEngine):
            return
        now = time.monotonic()
        if self._logged and now - self._logged < LOG_SECONDS:
            self._num_unlogged += 1
            return
        self._logged = now
        task = asyncio.get_running_loop().create_task(self._log(record, why, engine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def why_slow(self, record: Record) -> str | None:
        """None for a request that was fast enough."""
        config, times = self._config, record.times
        gaps = record.output_tokens - len(record.engine_ids)
        between = 1e3 * times.decode / gaps if times.decode is not None and gaps > 0 else None
        for what, found, limit, unit in (
            ("first token after", times.first_token, config.slow_request_ttft, "s"),
            ("time between tokens", between, config.slow_request_itl, "ms"),
            ("ended after", record.seconds, config.slow_request_seconds, "s"),
        ):
            if record.is_generating and found is not None and limit is not None and found > limit:
                return f"{what} {found:.4g} {unit} (limit {limit:g} {unit})"
        return None

    async def _log(self, record: Record, why: str, engine: RecordingEngine) -> None:
        try:
            found = await explained(engine, record.engine_ids)
        except Exception as error:  # the engine has stopped meanwhile
            logger.warning("slow request %s: %s; not explained: %s", record.request_id, why, error)
            return
        sentences = [sentence for _, each in found for sentence in each.sentences]
        missed, self._num_unlogged = self._num_unlogged, 0
        more = f" ({missed} other slow requests were not logged)" if missed else ""
        logger.warning(
            "slow request %s: %s. %s%s",
            record.request_id, why, " ".join(sentences) or "The record has nothing of it.", more,
            extra={
                "request_id": record.request_id, "engine_ids": names(record.engine_ids),
                "slow": why, "explanation": sentences, "not_logged": missed,
            },
        )  # fmt: skip


def names(ids: Sequence[int]) -> list[str]:
    return [f"r{each}" for each in ids]


async def histories(engine: ServingEngine | RecordingEngine | None) -> list[History]:
    """Of each engine core. Raises a 501 `ApiError` if none keeps a record."""
    records = await engine.records() if isinstance(engine, RecordingEngine) else []
    if not records:
        raise ApiError(501, "This engine keeps no record of decisions (--decision-record-bytes).")
    return [await asyncio.to_thread(read, each) for each in records]


async def explained(
    engine: ServingEngine | RecordingEngine, ids: Sequence[int]
) -> list[tuple[int, Explanation]]:
    """Of those in the record, each with its replica."""
    found = []
    for replica, history in enumerate(await histories(engine)):
        for request_id in ids:
            explanation = await asyncio.to_thread(explain, history, request_id)
            if explanation is not None:
                found.append((replica, explanation))
    return found


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
    async def explain_request(request: Request) -> Response:
        """Why a request took the time that it took: sentences, and the facts. id: `r17` or `17` (the answer's
        `x-quire-request-id`), the client's `x-request-id`, or the answer's id."""
        asked = request.path_params["id"]
        ids = state.explanations.ids_of(asked)
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
    async def show_timeline(request: Request) -> Response:
        """The decision record as Chrome's trace events, for https://ui.perfetto.dev. `seconds`: the last ones
        only."""
        text = request.query_params.get("seconds")
        try:
            seconds = None if text is None else float(text)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0.0 < seconds < float("inf"):
            raise bad_request("seconds must be a positive number.", param="seconds")
        found = await histories(state.loaded_engine())
        drawn = await asyncio.to_thread(timeline, found, seconds=seconds)
        return _json(drawn)

    return router


def _json(body: object) -> Response:
    return Response(
        msgspec.json.encode(body),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )

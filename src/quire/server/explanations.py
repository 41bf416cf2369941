"""Why a request took so long, for operators: finds requests by their ids, and logs those that were slower
than they should be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from quire.config import ServerConfig
from quire.scheduler.explain import explain_each, parse_id
from quire.scheduler.explanation import Explanation
from quire.scheduler.history import History
from quire.scheduler.record_reader import read
from quire.server.engine_protocol import RecordingEngine, ServingEngine
from quire.server.errors import ApiError
from quire.server.record import Record

logger = logging.getLogger(__name__)

MOST_KNOWN = 16_384
"""Requests whose ids are remembered."""
MOST_EXPLAINED = 256
"""Requests of one answer."""
LOG_SECONDS = 10.0
"""The least time between two slow requests that are logged."""


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
        requests may have come with one id; the last `MOST_EXPLAINED` count. The engine's own comes first: a
        client may have chosen `r17` too."""
        number = parse_id(text)
        known = (each.ids for each in self._known if text in (each.request_id, each.answer_id))
        named = [each for ids in known for each in ids][-MOST_EXPLAINED:]
        return list(dict.fromkeys([*([] if number is None else [number]), *named]))

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
    """Of each engine core. Raises a 404 `ApiError` if none keeps a record."""
    records = await engine.records() if isinstance(engine, RecordingEngine) else []
    if not records:
        raise ApiError(404, "This engine keeps no record of decisions (--decision-record-bytes).")
    return [await asyncio.to_thread(read, each) for each in records]


async def explained(
    engine: ServingEngine | RecordingEngine, ids: Sequence[int]
) -> list[tuple[int, Explanation]]:
    """Of those in the record, each with its replica."""
    found: list[tuple[int, Explanation]] = []
    for replica, history in enumerate(await histories(engine)):
        each = await asyncio.to_thread(explain_each, history, ids)
        found += [(replica, explanation) for explanation in each]
    return found

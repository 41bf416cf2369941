"""One line in the log for each finished request (--request-log): who asked, how much, how long, how it ended.

With --log-format json it is an object with the fields of `facts`. Never a text of a client or of the model.
"""

from __future__ import annotations

import logging

from quire.server.record import Record
from quire.server.tracing import parent_of

logger = logging.getLogger(__name__)


def log_finished(record: Record) -> None:
    if record.is_generating:
        logger.info("%s", line(record), extra=facts(record))


def facts(record: Record) -> dict[str, object]:
    """The same fields in every line; null for what is not known."""
    times, parent = record.times, parent_of(record.headers)
    return {
        "request_id": record.request_id,
        "answer_id": record.answer_id,
        "engine_ids": [f"r{each}" for each in record.engine_ids],
        "trace_id": None if parent is None else parent.trace_id,
        "tenant": record.tenant,
        "key": record.key_id,
        "endpoint": record.route,
        "model": record.model,
        "stream": record.streamed,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "num_prompts": len(record.work),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "num_preemptions": record.preemptions,
        "queue_seconds": _rounded(times.queue),
        "first_token_seconds": _rounded(times.first_token),
        "prefill_seconds": _rounded(times.prefill),
        "decode_seconds": _rounded(times.decode),
        "e2e_seconds": _rounded(record.seconds),
    }


def line(record: Record) -> str:
    """For people, and for a log that is text."""
    times = record.times
    spans = {"queue": times.queue, "prefill": times.prefill, "decode": times.decode}
    parts = [
        f"request {record.request_id}: {record.status} {record.finish_reason or '-'}",
        record.route,
        *([f"tenant {record.tenant}"] if record.tenant else []),
        f"{record.prompt_tokens} tokens in ({record.cached_tokens} cached), {record.output_tokens} out",
        *(f"{name} {seconds:.3f} s" for name, seconds in spans.items() if seconds is not None),
        f"in all {record.seconds:.3f} s",
    ]
    return ", ".join(parts)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)

"""How long a client waits for its answer: the field `timeout`, or a header. The smallest one counts, from the
request's arrival. What happens then is the engine's part (`scheduler/deadlines.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from quire.limits import MAX_TIMEOUT
from quire.outputs import RequestOutput
from quire.server.errors import ApiError, bad_request
from quire.server.record import Headers, Record

HEADER = b"x-request-timeout"
CLIENT_HEADER = b"x-stainless-read-timeout"
"""Sent by openai's and Anthropic's clients: how long they wait for the next byte."""


def deadline_of(record: Record, timeout: float | None, *, streamed: bool) -> float | None:
    """Seconds of `time.monotonic()`; None if the client has named no time. timeout: of the body. Raises a 400
    `ApiError` for a header that is no time.

    The client's own timeout is one between bytes, so it says nothing of a stream, whose keep-alive comments
    reset it, and nothing of a response in the background."""
    times = [timeout, _asked(record.headers)]
    if record.client_timeouts and not streamed and not record.is_background:
        times.append(_client_timeout(record.headers))
    known = [seconds for seconds in times if seconds is not None]
    return record.arrival_ts + min(known) if known else None


def _asked(headers: Headers) -> float | None:
    values = _values(headers, HEADER)
    if not values:
        return None
    seconds = _number(values[0]) if len(values) == 1 else math.nan
    if not 0 < seconds <= MAX_TIMEOUT:  # so written, NaN fails too
        raise bad_request(
            f"The header X-Request-Timeout must be a number of seconds above 0 and at most {MAX_TIMEOUT:g}, "
            "and be sent once.",
            param="x-request-timeout",
        )
    return seconds


def _client_timeout(headers: Headers) -> float | None:
    """None also for what is no time: its user has not written it."""
    values = _values(headers, CLIENT_HEADER)
    seconds = _number(values[0]) if values else 0.0
    return min(seconds, MAX_TIMEOUT) if seconds > 0 else None


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _number(value: bytes) -> float:
    try:
        return float(value.decode("ascii"))
    except ValueError:
        return math.nan


def expired() -> ApiError:
    return ApiError(
        408,
        "The request's timeout passed while it waited for its turn; nothing was computed. Allow more time, "
        "or send it when the server has less to do.",
        param="timeout",
    )


def timed_out() -> ApiError:
    """Of a request whose answer has no parts."""
    return ApiError(408, "The request's timeout passed before it was done.", param="timeout")


def check_expired(outputs: Iterable[RequestOutput], *, answered: bool = False) -> None:
    """Raises a 408 `ApiError` if nothing of the answer was computed, because its time was over. If a part
    was, the others end like it: that they had only waited makes no difference to a client. answered: whether
    the client has got a part."""
    parts = [part for output in outputs for part in output.outputs]
    late = [part for part in parts if part.finish_reason == "expired"]
    if late and len(late) == len(parts) and not answered:
        raise expired()
    for part in late:
        part.finish_reason = "timeout"

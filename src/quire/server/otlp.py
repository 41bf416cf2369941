"""Sends spans to an OpenTelemetry collector: OTLP over HTTP, in its JSON encoding.

Serving never waits for it. Spans go into a bounded queue, from which a thread sends them in batches; what
finds the queue full, or could not be sent after some tries, is dropped and counted. The thread starts with
the first span.
"""

from __future__ import annotations

import http.client
import logging
import queue
import ssl
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from quire.errors import ConfigError

logger = logging.getLogger(__name__)

QUEUE_SPANS = 8192
BATCH_SPANS = 512
BATCH_SECONDS = 1.0
"""The most that a span waits for others."""
SEND_SECONDS = 10.0
TRIES = 4
MOST_WAIT_SECONDS = 30.0
"""Between two tries, whatever the collector asks for."""
MOST_ANSWER_BYTES = 1 << 16
RETRIED = (429, 502, 503, 504)
"""As the protocol says; another status is final."""
TRACES_PATH = "/v1/traces"
INTERNAL, SERVER = 1, 2
"""Kinds of spans."""
OK, ERROR = 0, 2
"""Status codes; 0 is "unset"."""

Value = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16."""
    parent_id: str
    """Empty: the first one of its trace."""
    name: str
    start_ns: int
    """Wall time."""
    end_ns: int
    kind: int = INTERNAL
    attributes: Mapping[str, Value] = field(default_factory=dict)
    failed: bool = False
    trace_state: str = ""

    def to_json(self) -> dict[str, object]:
        found: dict[str, object] = {
            "traceId": self.trace_id,
            "spanId": self.span_id,
            "name": self.name,
            "kind": self.kind,
            "startTimeUnixNano": str(self.start_ns),
            "endTimeUnixNano": str(self.end_ns),
            "attributes": attributes_json(self.attributes),
            "status": {"code": ERROR} if self.failed else {},
        }
        if self.parent_id:
            found["parentSpanId"] = self.parent_id
        if self.trace_state:
            found["traceState"] = self.trace_state
        return found


def attributes_json(attributes: Mapping[str, Value]) -> list[dict[str, object]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, object]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}  # 64 bits, so a string, as protobuf's JSON has it
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_value(item) for item in value]}}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where spans are sent."""

    is_tls: bool
    host: str
    port: int
    target: str
    """Path and query."""

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """A URL without a path means /v1/traces. Raises `ConfigError`."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
            parts = urlsplit("")
        if "@" in parts.netloc:
            raise ConfigError(
                "otlp_traces_endpoint must not hold a password; a collector's key goes into "
                "OTEL_EXPORTER_OTLP_HEADERS, as authorization=Bearer%20KEY."
            )
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(
                f"otlp_traces_endpoint must be a URL like http://collector:4318{TRACES_PATH} (OTLP over "
                f"HTTP; gRPC, usually at port 4317, is not spoken), got {url!r}."
            )
        target = parts.path if parts.path not in ("", "/") else TRACES_PATH
        target += f"?{parts.query}" if parts.query else ""
        is_tls = parts.scheme == "https"
        return cls(is_tls, host, port or (443 if is_tls else 4318), target)

    def connect(self) -> http.client.HTTPConnection:
        if self.is_tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=SEND_SECONDS, context=context
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=SEND_SECONDS)


class Exporter:
    """`submit` is called from the event loop, `close` from a thread that may wait."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        resource: Mapping[str, Value],
        scope: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        queue_spans: int = QUEUE_SPANS,
        first_wait: float = 1.0,
    ) -> None:
        """resource: attributes of the process. scope: name and version of what makes the spans. headers: for
        the collector, as a key; they are not logged. first_wait: seconds before a second try."""
        self._endpoint = endpoint
        self._frame = {"attributes": attributes_json(resource)}, dict(scope)
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._first_wait = first_wait
        self._queue: queue.Queue[Span] = queue.Queue(queue_spans)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self._fails = False
        """Whether the last batch was lost: one line in the log when that begins, and when it ends."""
        self.num_sent = 0
        self.dropped: Counter[str] = Counter()
        """By reason: full, unreachable or rejected."""

    def submit(self, spans: Sequence[Span]) -> None:
        """All or none of a request's spans. Does not wait."""
        if self._closing.is_set() or self._queue.qsize() + len(spans) > self._queue.maxsize:
            self.dropped["full"] += len(spans)
            return
        for span in spans:
            self._queue.put_nowait(span)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="quire-otlp", daemon=True)
            self._thread.start()

    def close(self, seconds: float = 2.0) -> None:
        """Send what is left, for so long at most."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(seconds)

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while batch := self._take():
            try:
                self._send(batch)
            except Exception:  # the thread must outlive whatever a collector answers
                logger.exception("spans could not be sent")
                self.dropped["rejected"] += len(batch)
        if self._connection is not None:
            self._connection.close()

    def _take(self) -> list[Span]:
        """The next batch; empty when all has been sent and the exporter closes."""
        batch: list[Span] = []
        deadline = 0.0
        while len(batch) < BATCH_SPANS:
            wait = max(0.0, deadline - time.monotonic()) if batch else BATCH_SECONDS
            try:
                batch.append(self._queue.get(timeout=0.001 if self._closing.is_set() else wait))
            except queue.Empty:
                if batch or self._closing.is_set():
                    break
                continue
            if len(batch) == 1:
                deadline = time.monotonic() + BATCH_SECONDS
        return batch

    def _send(self, batch: Sequence[Span]) -> None:
        """Counts the batch, sent or dropped."""
        body = self._encode(batch)
        problem, wait = "", self._first_wait
        for attempt in range(TRIES):
            if attempt and self._closing.wait(min(wait, MOST_WAIT_SECONDS)):
                break  # no time for more tries
            wait *= 2
            try:
                status, asked_wait, answer = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status in RETRIED:
                problem, wait = f"status {status}", max(wait, asked_wait)
                continue
            refused = len(batch) if status >= 300 else min(_refused(answer), len(batch))
            self.num_sent += len(batch) - refused
            self.dropped["rejected"] += refused
            self._report(f"status {status}" if refused else "")
            return
        self.dropped["unreachable"] += len(batch)
        self._report(problem)

    def _encode(self, batch: Sequence[Span]) -> bytes:
        resource, scope = self._frame
        scoped = {"scope": scope, "spans": [span.to_json() for span in batch]}
        return msgspec.json.encode(
            {"resourceSpans": [{"resource": resource, "scopeSpans": [scoped]}]}
        )

    def _post(self, body: bytes) -> tuple[int, float, bytes]:
        """Status, Retry-After in seconds (0 if there is none), body. An error closes the connection, which is
        kept open otherwise."""
        connection = self._connection or self._endpoint.connect()
        self._connection = None
        try:
            connection.request("POST", self._endpoint.target, body, self._headers)
            answer = connection.getresponse()
            content = answer.read(MOST_ANSWER_BYTES)
            if not answer.isclosed():
                connection.close()  # a longer answer, of which the rest is not read
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        wait = answer.headers.get("retry-after", "")
        return answer.status, float(wait) if wait.isdecimal() else 0.0, content

    def _report(self, problem: str) -> None:
        if problem and not self._fails:
            logger.warning(
                "traces are lost: %s:%d: %s", self._endpoint.host, self._endpoint.port, problem
            )
        elif self._fails and not problem:
            logger.info("traces arrive again: %d were lost", self.dropped.total())
        self._fails = bool(problem)


class _Partial(msgspec.Struct, rename="camel"):
    rejected_spans: str | int = 0


class _Answer(msgspec.Struct, rename="camel"):
    partial_success: _Partial | None = None


def _refused(answer: bytes) -> int:
    """How many spans a collector that has answered 200 did not take."""
    try:
        partial = msgspec.json.decode(answer, type=_Answer).partial_success
        return 0 if partial is None else max(0, int(partial.rejected_spans))
    except (msgspec.DecodeError, ValueError):
        return 0  # an answer is optional

"""What is known of one HTTP request: when it came, whose it is, what it submitted, how it ended.

The middleware makes it at arrival and closes it at the end; the endpoints' shared code notes what it submits.
Its times are taken from the engine's outputs when all is over, so a token costs nothing here. It holds no
text of a client or of the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from quire.outputs import RequestOutput, RequestStateStats
from quire.sampling_params import PoolingParams, SamplingParams
from quire.server.engine_protocol import RequestStream

logger = logging.getLogger(__name__)

GENERATING = frozenset(
    {
        "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses",
        "/v1/messages", "/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank",
        "/v2/rerank",
    }
)  # fmt: skip
"""Routes whose requests are computed by the engine: those that are logged, traced and told the load."""

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds; None if it has not come to that, or is not known."""

    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    first_token: float | None = None
    """From its arrival in the engine."""


@dataclass(slots=True)
class Work:
    """One prompt that was submitted."""

    stream: RequestStream
    num_prompt_tokens: int

    @property
    def output(self) -> RequestOutput | None:
        return self.stream.last

    @property
    def stats(self) -> RequestStateStats:
        output = self.output
        return RequestStateStats() if output is None else output.metrics

    @property
    def finish_reason(self) -> str | None:
        """That of the sequence that ended last."""
        parts = self.output.outputs if self.output is not None else ()
        return next((p.finish_reason for p in reversed(parts) if p.finish_reason), None)

    def times(self, ended: float) -> Times:
        stats = self.stats
        queued_until = stats.scheduled_ts or (ended if self.finish_reason == "expired" else 0.0)
        return Times(
            span(stats.queued_ts, queued_until),
            span(stats.scheduled_ts, stats.first_token_ts),
            span(stats.first_token_ts, stats.last_token_ts),
            span(stats.arrival_ts, stats.first_token_ts),
        )


@dataclass(slots=True, eq=False)
class Record:
    """Of one request, until `finish` passes it to those who report it. `*_ts`: `time.monotonic()` seconds."""

    headers: Headers = ()
    on_end: Callable[[Record], None] = lambda record: None
    on_work: Callable[[Record, str], None] = lambda record, request_id: None
    """Called with its id when its work has been submitted."""
    client_timeouts: bool = False
    """Whether the timeout that the client keeps itself is a deadline here too."""
    arrival_ts: float = field(default_factory=time.monotonic)
    arrival_ns: int = field(default_factory=time.time_ns)
    """Wall time."""
    ended_ts: float = 0.0
    request_id: str = ""
    route: str = ""
    status: int = 0
    tenant: str | None = None
    key_id: str | None = None
    """The beginning of the key's digest."""
    model: str | None = None
    answer_id: str | None = None
    streamed: bool = False
    is_background: bool = False
    """Whether its work goes on after its answer; then `finish` is called at the end of the work."""
    params: SamplingParams | PoolingParams | None = None
    """Of the first prompt."""
    work: list[Work] = field(default_factory=list)

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """Of all its sequences."""
        return tuple(each for work in self.work for each in work.stream.sequence_ids)

    @property
    def is_generating(self) -> bool:
        return self.route in GENERATING

    @property
    def seconds(self) -> float:
        return self.ended_ts - self.arrival_ts

    @property
    def prompt_tokens(self) -> int:
        return sum(work.num_prompt_tokens for work in self.work)

    @property
    def cached_tokens(self) -> int:
        outputs = [work.output for work in self.work]
        return sum(output.num_cached_tokens or 0 for output in outputs if output is not None)

    @property
    def output_tokens(self) -> int:
        return sum(work.stats.num_generation_tokens for work in self.work)

    @property
    def preemptions(self) -> int:
        return sum(work.stats.num_preemptions for work in self.work)

    @property
    def finish_reason(self) -> str | None:
        """Of several prompts, the reasons that there were."""
        reasons = {work.finish_reason for work in self.work} - {None}
        return ",".join(sorted(map(str, reasons))) or None

    @property
    def times(self) -> Times:
        """Of several prompts, the longest."""
        each = [work.times(self.ended_ts) for work in self.work]
        return Times(
            _most(times.queue for times in each),
            _most(times.prefill for times in each),
            _most(times.decode for times in each),
            _most(times.first_token for times in each),
        )

    def close(self, status: int) -> None:
        """The answer has been sent, or its client has gone."""
        self.status = status
        if not (self.is_background and status < 400):
            self.finish()

    def finish(self) -> None:
        self.ended_ts = time.monotonic()
        try:
            self.on_end(self)
        except Exception:  # a report that fails must not fail the request
            logger.exception("request %s could not be reported", self.request_id)


def span(start: float, end: float) -> float | None:
    """None if one of the two has not happened."""
    return max(0.0, end - start) if start > 0.0 and end > 0.0 else None


def _most(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)

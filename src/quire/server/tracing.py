"""Spans of requests for OpenTelemetry (--otlp-traces-endpoint).

One per request with vLLM's name and attributes, and below it for each prompt `queue`, `prefill` and `decode`.
They are made when the request has ended, from its record, so tracing costs nothing while tokens come. No span
holds a text of a client or of the model.
"""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams
from quire.server.otlp import INTERNAL, SERVER, TRACES_PATH, Endpoint, Exporter, Span, Value
from quire.server.record import Headers, Record, Work
from quire.util.version import VERSION

REQUEST = "llm_request"
"""vLLM's name."""
MOST_PROMPTS = 16
"""Of a request, that have spans of their own."""
MAX_STATE = 512
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Parent:
    """The caller's span."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str


def parent_of(headers: Headers) -> Parent | None:
    """What `traceparent` says (W3C Trace Context). None if there is none, or it is invalid, which counts as
    absent."""
    values = [value for name, value in headers if name == b"traceparent"]
    found = _PARENT.fullmatch(values[0].strip()) if len(values) == 1 else None
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Parent(trace.decode(), span.decode(), bool(int(flags, 16) & 1), _state(headers))


def _state(headers: Headers) -> str:
    """`tracestate`, which belongs to the caller and is passed on as it is."""
    text = b",".join(value for name, value in headers if name == b"tracestate").decode("latin-1")
    return text if text.isascii() and text.isprintable() and len(text) <= MAX_STATE else ""


class Tracer:
    """Makes the spans of requests that are sampled: if the caller's span is, or, without one, a share."""

    def __init__(self, exporter: Exporter, *, ratio: float = 1.0) -> None:
        self.exporter = exporter
        self._ratio = ratio

    def report(self, record: Record) -> None:
        if not record.is_generating:
            return
        parent = parent_of(record.headers)
        sampled = random.random() < self._ratio if parent is None else parent.sampled
        if sampled:
            self.exporter.submit(list(spans_of(record, parent)))


def spans_of(record: Record, parent: Parent | None) -> Iterator[Span]:
    """The request's own first."""
    trace_id = secrets.token_hex(16) if parent is None else parent.trace_id
    state = "" if parent is None else parent.state
    own = secrets.token_hex(8)

    def wall(seconds: float) -> int:
        return record.arrival_ns + round((seconds - record.arrival_ts) * 1e9)

    yield Span(
        trace_id,
        own,
        "" if parent is None else parent.span_id,
        REQUEST,
        record.arrival_ns,
        wall(record.ended_ts),
        SERVER,
        attributes_of(record),
        failed=record.status >= 500 or record.finish_reason == "error",
        trace_state=state,
    )
    for index, work in enumerate(record.work[:MOST_PROMPTS]):
        which: dict[str, Value] = {"quire.prompt_index": index} if len(record.work) > 1 else {}
        for name, begin, end in phases(work, record.ended_ts):
            yield Span(
                trace_id,
                secrets.token_hex(8),
                own,
                name,
                wall(begin),
                wall(end),
                INTERNAL,
                which,
                trace_state=state,
            )


def phases(work: Work, ended_ts: float) -> Iterator[tuple[str, float, float]]:
    """Those that have begun and ended, and the last one, whose end is the request's, if it did not."""
    stats = work.stats
    marks = (
        ("queue", stats.queued_ts, stats.scheduled_ts),
        ("prefill", stats.scheduled_ts, stats.first_token_ts),
        ("decode", stats.first_token_ts, stats.last_token_ts),
    )
    for name, begin, end in marks:
        if begin > 0.0:
            yield name, begin, max(begin, end or ended_ts)


def attributes_of(record: Record) -> dict[str, Value]:
    """vLLM's, then OpenTelemetry's for HTTP, then our own."""
    times, params = record.times, record.params
    sampling = params if isinstance(params, SamplingParams) else None
    reasons = record.finish_reason
    known: dict[str, Value | None] = {
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.response.finish_reasons": tuple(reasons.split(",")) if reasons else None,
        "gen_ai.request.n": None if sampling is None else sampling.n,
        "gen_ai.request.max_tokens": None if sampling is None else sampling.max_tokens,
        "gen_ai.request.temperature": None if sampling is None else float(sampling.temperature),
        "gen_ai.request.top_p": None if sampling is None else float(sampling.top_p),
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.output_tokens,
        "gen_ai.latency.e2e": record.seconds,
        "gen_ai.latency.time_in_queue": times.queue,
        "gen_ai.latency.time_to_first_token": times.first_token,
        "gen_ai.latency.time_in_model_prefill": times.prefill,
        "gen_ai.latency.time_in_model_decode": times.decode,
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "quire.tenant": record.tenant,
        "quire.cached_tokens": record.cached_tokens,
        "quire.preemptions": record.preemptions,
    }
    return {name: value for name, value in known.items() if value is not None}


def create_tracer(config: ServerConfig, environ: Mapping[str, str]) -> Tracer | None:
    """None if no collector is named, by the option or OpenTelemetry's variables. Raises `ConfigError`."""
    url = config.otlp_traces_endpoint or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not url and (base := environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        url = base.rstrip("/") + TRACES_PATH
    if not url or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    resource: dict[str, Value] = {
        "service.name": "quire",
        "service.version": VERSION,
        **_pairs(environ, "OTEL_RESOURCE_ATTRIBUTES"),
    }
    if name := environ.get("OTEL_SERVICE_NAME"):
        resource["service.name"] = name
    headers = _pairs(environ, "OTEL_EXPORTER_OTLP_HEADERS") | _pairs(
        environ, "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
    )
    exporter = Exporter(
        Endpoint.parse(url),
        resource=resource,
        scope={"name": "quire", "version": VERSION},
        headers={name.lower(): value for name, value in headers.items()},
    )
    return Tracer(exporter, ratio=config.trace_sample_ratio)


def _pairs(environ: Mapping[str, str], name: str) -> dict[str, str]:
    """name=value,name=value, percent-encoded."""
    found = {}
    for item in filter(str.strip, environ.get(name, "").split(",")):
        key, equals, value = item.partition("=")
        key, value = unquote(key.strip()), unquote(value.strip())
        if not equals or not key or not (key + value).isprintable():
            raise ConfigError(f"{name} must be name=value pairs, separated by commas.")
        found[key] = value
    return found

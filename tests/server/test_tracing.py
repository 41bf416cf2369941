"""Which requests have spans, and what is in them. With a real engine and collector: test_observed.py."""

from __future__ import annotations

import pytest
from collector import attributes, collecting
from hypothesis import given
from hypothesis import strategies as st

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.outputs import CompletionOutput, RequestOutput, RequestStateStats
from quire.sampling_params import SamplingParams
from quire.server.record import Record, Work
from quire.server.tracing import Parent, Tracer, create_tracer, parent_of, spans_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"


def headers(*parents: str, state: tuple[str, ...] = ()) -> list[tuple[bytes, bytes]]:
    return [(b"traceparent", p.encode()) for p in parents] + [
        (b"tracestate", s.encode()) for s in state
    ]


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (VALID, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
        (f" {VALID} ", True),
    ],
)
def test_parents(text: str, sampled: bool) -> None:
    assert parent_of(headers(text)) == Parent(TRACE, SPAN, sampled, "")


@pytest.mark.parametrize(
    "text",
    [
        "", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-zz", f"00_{TRACE}_{SPAN}_01", f"0x-{TRACE}-{SPAN}-01",
    ],
)  # fmt: skip
def test_what_is_invalid_counts_as_absent(text: str) -> None:
    assert parent_of(headers(text)) is None


def test_two_are_ambiguous() -> None:
    assert parent_of(headers(VALID, VALID)) is None


@given(st.binary(max_size=80))
def test_any_header(value: bytes) -> None:
    parent = parent_of([(b"traceparent", value), (b"tracestate", value)])
    assert parent is None or (parent.trace_id.islower() or parent.trace_id.isdigit())


def test_the_state_is_passed_on_if_it_is_plain() -> None:
    assert parent_of(headers(VALID, state=("a=1", "b=2"))).state == "a=1,b=2"
    assert parent_of(headers(VALID, state=("a=\x7f",))).state == ""
    assert parent_of(headers(VALID, state=("a" * 513,))).state == ""


class Done:
    """A stream that is over."""

    request_id = "r"

    def __init__(self, reason: str, **stats: float) -> None:
        parts = [CompletionOutput(0, "secret words", [1], finish_reason=reason)]
        times = RequestStateStats(**stats)
        self.last = RequestOutput("r", "secret", [1], parts, True, times, num_cached_tokens=2)


class Sink:
    def __init__(self) -> None:
        self.spans = []

    def submit(self, spans) -> None:
        self.spans += spans


RAN = {"arrival_ts": 101.0, "queued_ts": 101.5, "scheduled_ts": 102.0, "first_token_ts": 104.0,
       "last_token_ts": 107.0, "num_generation_tokens": 4, "num_preemptions": 1}  # fmt: skip


def record(*streams: Done, **fields: object) -> Record:
    fields = {"route": "/v1/completions", "status": 200, "request_id": "q", "model": "m", **fields}
    work = [Work(stream, 5) for stream in streams]
    params = SamplingParams(max_tokens=9, temperature=0.5)
    return Record(
        arrival_ts=100.0, arrival_ns=10**18, ended_ts=110.0, params=params, work=work, **fields
    )


def test_spans_of_a_request() -> None:
    own, *children = spans_of(record(Done("stop", **RAN)), Parent(TRACE, SPAN, True, "v=1"))
    assert (own.trace_id, own.parent_id, own.name, own.kind, own.trace_state) == (
        TRACE, SPAN, "llm_request", 2, "v=1",
    )  # fmt: skip
    assert (own.start_ns - 10**18, own.end_ns - 10**18) == (0, 10**10) and not own.failed
    assert [(s.name, s.start_ns - 10**18, s.end_ns - 10**18) for s in children] == [
        ("queue", 15 * 10**8, 2 * 10**9),
        ("prefill", 2 * 10**9, 4 * 10**9),
        ("decode", 4 * 10**9, 7 * 10**9),
    ]
    assert {(s.trace_id, s.parent_id) for s in children} == {(TRACE, own.span_id)}
    assert len({s.span_id for s in [own, *children]}) == 4
    assert own.attributes["gen_ai.latency.time_in_model_decode"] == 3.0
    assert own.attributes["gen_ai.latency.time_to_first_token"] == 3.0
    assert own.attributes["gen_ai.usage.prompt_tokens"] == 5
    assert own.attributes["gen_ai.usage.completion_tokens"] == 4
    assert own.attributes["gen_ai.request.temperature"] == 0.5
    assert own.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert "secret" not in repr([own, *children])


def test_without_a_parent_there_is_a_new_trace() -> None:
    first, second = (next(spans_of(record(Done("stop", **RAN)), None)) for _ in range(2))
    assert first.parent_id == "" and len(first.trace_id) == 32 and first.trace_id != second.trace_id


def test_a_phase_that_did_not_end_ends_with_the_request() -> None:
    cut = {"arrival_ts": 101.0, "queued_ts": 101.5, "scheduled_ts": 102.0}
    _, queue, prefill = spans_of(record(Done("timeout", **cut)), None)
    assert (prefill.name, prefill.end_ns - 10**18) == ("prefill", 10**10)
    own, queue = spans_of(
        record(Done("expired", arrival_ts=101.0, queued_ts=101.5), status=408), None
    )
    assert (queue.name, queue.end_ns - 10**18) == ("queue", 10**10)
    assert own.attributes["gen_ai.latency.time_in_queue"] == 8.5 and not own.failed


def test_several_prompts() -> None:
    own, *children = spans_of(record(*[Done("stop", **RAN)] * 40), None)
    assert len(children) == 3 * 16, "of the first prompts only"
    assert [c.attributes["quire.prompt_index"] for c in children[::3]] == list(range(16))
    assert own.attributes["gen_ai.usage.prompt_tokens"] == 200


@pytest.mark.parametrize(
    ("parent", "ratio", "traced"),
    [(VALID, 0.0, True), (VALID[:-1] + "0", 1.0, False), (None, 0.0, False), (None, 1.0, True)],
)
def test_who_decides(parent: str | None, ratio: float, traced: bool) -> None:
    sink = Sink()
    asked = record(Done("stop", **RAN), headers=headers(*([parent] if parent else [])))
    Tracer(sink, ratio=ratio).report(asked)
    assert bool(sink.spans) == traced


def test_other_routes_have_no_spans() -> None:
    sink = Sink()
    Tracer(sink).report(record(route="/tokenize"))
    assert not sink.spans


def test_a_failure_is_one() -> None:
    assert next(spans_of(record(status=503), None)).failed
    assert next(spans_of(record(Done("error", **RAN)), None)).failed
    assert not next(spans_of(record(status=429), None)).failed


# --- configuration --------------------------------------------------------------------------------


def test_no_collector_no_tracer() -> None:
    assert create_tracer(ServerConfig(), {}) is None
    with_url = ServerConfig(otlp_traces_endpoint="http://c")
    assert create_tracer(with_url, {"OTEL_SDK_DISABLED": "true"}) is None


@pytest.mark.parametrize(
    ("flag", "environ", "target"),
    [
        ("http://flag/x", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://env/y"}, "/x"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://env/y"}, "/y"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://env/base/"}, "/base/v1/traces"),
    ],
)
def test_where_the_collector_is_named(flag: str | None, environ: dict, target: str) -> None:
    tracer = create_tracer(ServerConfig(otlp_traces_endpoint=flag), environ)
    assert tracer.exporter._endpoint.target == target


def test_the_environment_of_opentelemetry() -> None:
    environ = {
        "OTEL_SERVICE_NAME": "chat",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=prod, service.name=other",
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20k,x=1",
    }
    with collecting() as collector:
        tracer = create_tracer(ServerConfig(otlp_traces_endpoint=collector.url), environ)
        tracer.report(record(Done("stop", **RAN)))
        tracer.exporter.close(30)
    resource = attributes(collector.bodies[0]["resourceSpans"][0]["resource"])
    assert resource["service.name"] == "chat" and resource["deployment.environment.name"] == "prod"
    assert collector.headers[0]["authorization"] == "Bearer k" and collector.headers[0]["x"] == "1"


@pytest.mark.parametrize("value", ["key", "=v", "a=b%0d%0ac: d"])
def test_wrong_pairs_are_refused(value: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": value}
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS"):
        create_tracer(ServerConfig(otlp_traces_endpoint="http://c"), environ)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_is_one(ratio: float) -> None:
    with pytest.raises(ConfigError, match="trace_sample_ratio"):
        ServerConfig(trace_sample_ratio=ratio)

"""The exporter of spans: what it sends, and that nobody waits for it."""

from __future__ import annotations

import base64
import json
import socket

import pytest
from collector import Collector, attributes, collecting, wait_for

from quire.errors import ConfigError
from quire.metrics.trace_metrics import TraceMetrics
from quire.server.otlp import BATCH_SPANS, Endpoint, Exporter, Span

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def span(number: int = 1, **fields: object) -> Span:
    return Span(TRACE, f"{number:016x}", PARENT, "s", 10, 20, **fields)


def exporter(url: str, **options: object) -> Exporter:
    options = {
        "resource": {"service.name": "t"},
        "scope": {"name": "quire"},
        "first_wait": 0.01,
        **options,
    }
    return Exporter(Endpoint.parse(url), **options)


@pytest.fixture
def collector():
    with collecting() as collector:
        yield collector


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_what_is_sent(collector: Collector) -> None:
    sender = exporter(collector.url, headers={"authorization": "Bearer k"})
    values = {"s": "ü", "i": 2**62, "d": 0.5, "b": True, "a": ("x", "y")}
    sender.submit([span(attributes=values, failed=True, trace_state="v=1"), span(2)])
    sender.close(30)
    [body] = collector.bodies
    [resource] = body["resourceSpans"]
    assert attributes(resource["resource"]) == {"service.name": "t"}
    [scope] = resource["scopeSpans"]
    assert scope["scope"] == {"name": "quire"}
    first, second = scope["spans"]
    assert attributes(first) == {**values, "a": ["x", "y"]}
    assert (first["traceId"], first["spanId"], first["parentSpanId"]) == (
        TRACE,
        f"{1:016x}",
        PARENT,
    )
    assert (first["startTimeUnixNano"], first["endTimeUnixNano"]) == ("10", "20")
    assert first["status"] == {"code": 2} and first["traceState"] == "v=1"
    assert second["status"] == {} and "traceState" not in second
    assert sender.num_sent == 2 and not sender.dropped.total()
    assert collector.headers[0]["authorization"] == "Bearer k"
    assert collector.headers[0]["content-type"] == "application/json"


def test_it_is_what_opentelemetry_reads(collector: Collector) -> None:
    """The JSON is parsed by the protocol's own definition. (OTLP writes ids in hexadecimal, protobuf's JSON
    in base64: the one difference.)"""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    from google.protobuf import json_format

    sender = exporter(collector.url)
    sender.submit([span(attributes={"i": 7, "a": ("x",)}, failed=True)])
    sender.close(30)
    [body] = collector.bodies
    for sent in collector.spans:
        for name in ("traceId", "spanId", "parentSpanId"):
            sent[name] = base64.b64encode(bytes.fromhex(sent[name])).decode()
    request = json_format.ParseDict(body, service.ExportTraceServiceRequest())
    [read] = request.resource_spans[0].scope_spans[0].spans
    assert read.trace_id.hex() == TRACE and read.status.code == 2 and read.end_time_unix_nano == 20
    assert read.attributes[0].value.int_value == 7


def test_many_go_in_batches_over_one_connection(collector: Collector) -> None:
    sender = exporter(collector.url)
    for number in range(1, 1201):
        sender.submit([span(number)])
    sender.close(60)
    assert len(collector.spans) == 1200 == sender.num_sent
    assert 3 <= len(collector.bodies) < 100


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_be_tried_again_is(collector: Collector, status: int) -> None:
    collector.statuses = [status, status]
    collector.retry_after = "0"
    sender = exporter(collector.url)
    sender.submit([span()])
    wait_for(lambda: sender.num_sent)
    assert len(collector.paths) == 3 and len(collector.spans) == 1
    sender.close(30)


@pytest.mark.parametrize("status", [307, 400, 404, 500])
def test_what_is_final_is_counted_at_once(collector: Collector, status: int) -> None:
    collector.statuses = [status]
    sender = exporter(collector.url)
    sender.submit([span()])
    wait_for(lambda: sender.dropped["rejected"])
    sender.submit([span(2)])
    sender.close(30)
    assert [s["spanId"] for s in collector.spans] == [f"{2:016x}"]
    assert dict(sender.dropped) == {"rejected": 1} and sender.num_sent == 1


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ({"partialSuccess": {"rejectedSpans": "2", "errorMessage": "old"}}, 2),
        ({"partialSuccess": {"rejectedSpans": 1}}, 1),
        ({"partialSuccess": {"rejectedSpans": "99"}}, 3),
        ({"partialSuccess": {}}, 0),
        ([], 0),
    ],
)
def test_a_collector_that_takes_a_part(collector: Collector, answer: object, refused: int) -> None:
    collector.answer = json.dumps(answer).encode()
    sender = exporter(collector.url)
    sender.submit([span(1), span(2), span(3)])
    sender.close(30)
    assert (sender.num_sent, sender.dropped["rejected"]) == (3 - refused, refused)


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    """`submit` returns at once, whatever happens behind it; all that is lost is counted, and said once."""
    sender = exporter(f"http://127.0.0.1:{free_port()}", queue_spans=4)
    sender.submit([span(1)])
    wait_for(lambda: sender.dropped["unreachable"])
    sender.submit([span(2)])
    wait_for(lambda: sender.dropped["unreachable"] == 2)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "traces are lost: 127.0.0.1" in caplog.text
    sender.close(30)
    sender.submit([span(3)])
    assert dict(sender.dropped) == {"unreachable": 2, "full": 1} and sender.num_sent == 0


def test_a_collector_that_never_answers() -> None:
    """It holds a batch; what the queue cannot hold beside that is lost at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = exporter(f"http://127.0.0.1:{silent.getsockname()[1]}", queue_spans=4)
        sender.submit([span(number) for number in range(5)])
        assert dict(sender.dropped) == {"full": 5}, "all spans of a request, or none"
        for number in range(BATCH_SPANS + 100):
            sender.submit([span(number)])
        assert sender.dropped["full"] >= 100
        sender.close(0.01)


def test_metrics() -> None:
    sender = exporter("http://127.0.0.1:9")
    sender.num_sent = 3
    sender.dropped["full"] = 2
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in TraceMetrics(lambda: sender).collect()
        for sample in family.samples
    }
    assert samples == {
        ("quire:trace_spans_sent_total",): 3,
        ("quire:trace_spans_dropped_total", "full"): 2,
        ("quire:trace_spans_dropped_total", "unreachable"): 0,
        ("quire:trace_spans_dropped_total", "rejected"): 0,
    }
    values = [sample.value for family in TraceMetrics().collect() for sample in family.samples]
    assert values == [0, 0, 0, 0], "the alert has something to look at"


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("http://c", Endpoint(False, "c", 4318, "/v1/traces")),
        ("http://c:99/", Endpoint(False, "c", 99, "/v1/traces")),
        ("https://c/otlp/traces?t=1", Endpoint(True, "c", 443, "/otlp/traces?t=1")),
        ("http://[::1]:4318/v1/traces", Endpoint(False, "::1", 4318, "/v1/traces")),
    ],
)
def test_endpoints(url: str, parsed: Endpoint) -> None:
    assert Endpoint.parse(url) == parsed


@pytest.mark.parametrize(
    "url", ["grpc://c:4317", "c:4318", "http://", "http://c:port", "", "http://[c"]
)
def test_wrong_endpoints(url: str) -> None:
    with pytest.raises(ConfigError, match="OTLP over HTTP"):
        Endpoint.parse(url)


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as caught:
        Endpoint.parse("http://me:hunter2@c")
    assert "hunter2" not in str(caught.value)

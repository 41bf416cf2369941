"""Medians, ratios, floors and the markdown, from made-up samples."""

from __future__ import annotations

from typing import Any

import pytest
from bench.peers import report
from bench.peers.client import Reply, _parse, percentile, summarize

MEASURES = {(m.workload, m.key): m for m in report.MEASURES}
DECODE, TTFT = MEASURES["W2", "decode_tok_s"], MEASURES["W2", "ttft_ms"]


def sample(
    engine: str, workload: str, repeat: int, others: float = 0.0, **measures: float
) -> dict[str, Any]:
    return {
        "engine": engine,
        "workload": workload,
        "repeat": repeat,
        "attempt": 0,
        "others": others,
        "measures": measures,
    }


def results(samples: list[dict[str, Any]], **skipped: str) -> dict[str, Any]:
    names = dict.fromkeys(s["engine"] for s in samples)
    return {
        "record": {
            "date": "2026-11-21T12:00:00+00:00",
            "commit": "0123456789abcdef",
            "dirty": False,
            "command": "python -m bench.peers.compare",
            "machine": {"cpu": "AMD EPYC", "cpus_usable": 2, "memory_gib": 24.0},
        },
        "model": "M2",
        "title": "Llama 110M",
        "smoke": False,
        "repeats": 3,
        "engines": {
            name: {
                "version": "1",
                "settings": {"threads": 2},
                "env": {},
                "failures": [],
                "load_s": 1.0,
                "first_answer_s": 2.0,
                "peak_rss_mib": 500.0,
            }
            for name in names
        },
        "skipped": skipped,
        "samples": samples,
    }


def w2(engine: str, *decode: float, ttft: float = 50.0) -> list[dict[str, Any]]:
    return [
        sample(engine, "W2", repeat, ttft_ms=ttft, decode_tok_s=value)
        for repeat, value in enumerate(decode)
    ]


def test_the_median_leaves_the_warm_up_out() -> None:
    warm = sample("quire", "W2", -1, ttft_ms=1.0, decode_tok_s=999.0)
    found = report.cell(results([warm, *w2("quire", 100, 300, 200)]), "quire", DECODE)
    assert found == report.Cell(200, 100, 300, 3, noisy=False)
    assert report.cell(results([warm]), "quire", DECODE) is None


def test_of_a_repeat_the_least_disturbed_attempt_counts() -> None:
    attempts = [
        sample("quire", "W2", 0, 0.9, ttft_ms=1, decode_tok_s=10),
        sample("quire", "W2", 0, 0.3, ttft_ms=1, decode_tok_s=30),
        sample("quire", "W2", 0, 0.5, ttft_ms=1, decode_tok_s=20),
    ]
    assert report.cell(results(attempts), "quire", DECODE) == report.Cell(30, 30, 30, 1, noisy=True)


def test_a_ratio_above_one_means_better_either_way() -> None:
    run = results([
        *w2("quire", 200, ttft=40),
        *w2("vllm", 100, ttft=80),
        *w2("llama.cpp", 160, ttft=100),
        *w2("quire cache-off", 999, ttft=1),
    ])  # fmt: skip
    decode, ttft = report.compare(run, DECODE), report.compare(run, TTFT)
    assert decode is not None and (decode.best, decode.ratio) == ("llama.cpp", 1.25)
    assert ttft is not None and (ttft.best, ttft.ratio) == ("vllm", 2.0)


def test_nothing_is_compared_with_nobody() -> None:
    assert report.compare(results(w2("quire", 1)), DECODE) is None
    assert report.compare(results(w2("vllm", 1)), DECODE) is None


def test_shares_of_the_floor() -> None:
    assert report.share_of_floor(DECODE, 270, 135) == pytest.approx(0.5)
    assert report.share_of_floor(TTFT, 51, 102) == pytest.approx(0.5)


def test_floors_are_those_of_the_machine() -> None:
    run = results(w2("quire", 200))
    assert report.floor_of(DECODE, run) == 270
    assert report.floor_of(MEASURES["W3", "seconds"], run) is None
    run["record"]["machine"]["cpu"] = "Intel(R) Xeon(R) Processor"
    assert report.floor_of(DECODE, run) is None


def test_cache_ratio() -> None:
    run = results([
        sample("quire", "W3", 0, seconds=0.5),
        sample("quire cache-off", "W3", 0, seconds=3.0),
    ])  # fmt: skip
    assert report.cache_ratio(run) == 6.0
    assert report.cache_ratio(results(w2("quire", 1))) is None


def test_much_slower_needs_every_measure_to_be() -> None:
    warm = [
        sample("a", "W2", -1, ttft_ms=10, decode_tok_s=100),
        sample("b", "W2", -1, ttft_ms=100, decode_tok_s=10),
        sample("c", "W2", -1, ttft_ms=100, decode_tok_s=50),
    ]
    assert report.much_slower(warm, "W2", 3) == {"b"}
    assert report.much_slower([], "W2", 3) == set()


def test_markdown() -> None:
    run = results(
        [*w2("quire", 200, 210, 220), *w2("llama.cpp", 140, 150, 160, ttft=45)],
        openvino="not installed: no such thing",
    )
    page = report.markdown(run)
    assert (
        "| W2 one request, decode tok/s | 210.0 | 150.0 llama.cpp | **1.40** "
        "| 1.3 met, 80% of floor **missed** | 270 | 78% |" in page
    )
    assert "| **0.90** | 1 **missed** | 51 | 102% |" in page
    assert "210.0 (200.0 - 220.0)" in page
    assert "Skipped: **openvino**, not installed" in page
    assert "0123456789ab" in page and "python -m bench.peers.compare" in page


def test_markdown_of_a_server_workload() -> None:
    figures = {"interactivity": 26.0, "ttft_p50": 200.0, "ttft_p99": 900.0}
    ours = sample("quire", "W6", 0, **figures) | {"command": "quire serve", "rate": None}
    theirs = sample("vllm", "W6", 0, **figures | {"interactivity": 13.0}) | {"command": "vllm"}
    page = report.markdown(results([ours, theirs]))
    assert "| W6 agents, interactivity tok/s | 26.0 | 13.0 vllm | **2.00** | 1.3 met |" in page
    assert "- **quire** server, W6: `quire serve`" in page


def test_the_client_times_events_by_their_last_byte() -> None:
    reply = Reply(sent=0.0)
    chunks = [
        (1.0, b'1f\r\ndata: {"choices": [{"text": "a"}]}\n\n\r\n20\r\ndata: {"choices"'),
        (2.0, b': [{"text": "b"}]}\n\n\r\ndata: {"choices": [{"text": ""}]}\n'),
        (3.0, b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'),
    ]
    _parse(chunks, reply)
    assert reply.token_times == [1.0, 2.0]
    assert reply.num_tokens == 2
    with pytest.raises(RuntimeError, match="too long"):
        _parse([(0.0, b'data: {"error": "too long"}\n')], Reply(sent=0.0))


def test_summary() -> None:
    replies = [
        (1.0, Reply(1.0, [1.1, 1.2, 1.5], num_tokens=3)),
        (2.0, Reply(2.0, [2.3, 2.4], num_tokens=2)),
    ]
    found = summarize(replies, 2.5)
    assert found.ttft_p50 == pytest.approx(200) and found.tpot_p50 == pytest.approx(150)
    assert found.itl_p50 == pytest.approx(100) and found.itl_p99 == pytest.approx(296)
    assert percentile([3, 1, 2], 50) == 2 and percentile([5], 99) == 5

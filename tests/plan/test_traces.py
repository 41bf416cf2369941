"""Generated traffic has the lengths, gaps and shared prefixes of the traces, and files are read."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.plan.trace_files import read_trace
from quire.plan.traces import (
    DAY,
    SHAPES,
    SHARES,
    Arrivals,
    TraceRequest,
    at_rate,
    cut,
    generate,
)

LONG = 1 << 20


def made(
    name: str, *, count: float = 40_000, rate: float | None = None, seed: int = 0, **more: float
) -> list[TraceRequest]:
    rate = rate or SHAPES[name].rate or 5.0
    return list(generate(name, Arrivals(rate, count / rate, **more), seed=seed, longest=LONG))


@pytest.mark.parametrize("name", SHAPES)
def test_the_quantiles_are_those_of_the_trace(name: str) -> None:
    requests = made(name)
    tables = (SHAPES[name].prompts, "prompt_len"), (SHAPES[name].outputs, "output_len")
    for table, field in tables:
        values = sorted(getattr(request, field) for request in requests)
        found = [values[int(share * len(values))] for share in SHARES[2:-1]]
        assert found == pytest.approx(table[2:-1], rel=0.05, abs=1)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("azure-code", 2048, 28), ("azure-conv", 1155, 211), ("mooncake", 12035, 343)],
)
def test_the_means_are_those_of_the_trace(name: str, prompt: float, output: float) -> None:
    requests = made(name)
    assert statistics.fmean(r.prompt_len for r in requests) == pytest.approx(prompt, rel=0.03)
    assert statistics.fmean(r.output_len for r in requests) == pytest.approx(output, rel=0.05)


@pytest.mark.parametrize(
    ("name", "rate", "cv"), [("azure-conv", 5.53, 1.09), ("mooncake", 3.40, 1)]
)
def test_gaps_of_steady_traffic(name: str, rate: float, cv: float) -> None:
    gaps = [late.time - early.time for early, late in pairwise(made(name))]
    mean = statistics.fmean(gaps)
    assert 1 / mean == pytest.approx(rate, rel=0.02)
    assert statistics.stdev(gaps) / mean == pytest.approx(cv, rel=0.03)


def test_code_comes_in_bursts() -> None:
    """Gaps with a coefficient of variation of 13.2; in a minute 0, 111, 632 requests: least, median, most."""
    requests = made("azure-code", count=2.57 * DAY)
    gaps = [late.time - early.time for early, late in pairwise(requests)]
    mean = statistics.fmean(gaps)
    assert 1 / mean == pytest.approx(2.57, rel=0.03)
    assert 11 < statistics.stdev(gaps) / mean < 15
    counts = Counter(int(request.time // 60) for request in requests)
    minutes = sorted(counts[minute] for minute in range(1440))
    assert minutes[0] == 0
    assert minutes[720] == pytest.approx(111, rel=0.15)
    assert minutes[-1] == pytest.approx(632, rel=0.25)


@pytest.mark.parametrize("seed", range(3))
def test_mooncake_shares_as_many_blocks_as_the_trace(seed: int) -> None:
    seen: set[int] = set()
    hits = blocks = 0
    for request in made("mooncake", count=6000, seed=seed):
        for content, _ in request.prompt:
            blocks += 1
            hits += content in seen
            seen.add(content)
    assert hits / blocks == pytest.approx(0.366, abs=0.02)


def test_shared_blocks_are_prefixes() -> None:
    before: set[tuple[tuple[int, int], ...]] = set()
    for request in made("mooncake", count=500):
        contents = {content for prompt in before for content, _ in prompt}
        shared = [index for index, (content, _) in enumerate(request.prompt) if content in contents]
        assert shared == list(range(len(shared)))
        before.add(request.prompt)


def test_the_seed_decides() -> None:
    assert made("mooncake", count=300) == made("mooncake", count=300)
    assert made("mooncake", count=300) != made("mooncake", count=300, seed=1)


def test_a_day_has_an_evening_and_a_night() -> None:
    requests = made("azure-conv", rate=2.0, count=2 * DAY, daily=0.6)
    hours = Counter(int(request.time // 3600) for request in requests)
    assert hours[13] == pytest.approx(2 * 3600 * 1.6, rel=0.06)
    assert hours[2] == pytest.approx(2 * 3600 * 0.4, rel=0.1)
    assert len(requests) == pytest.approx(2 * DAY, rel=0.02)


def test_lengths_are_cut_at_the_model_s_limit() -> None:
    requests = list(generate("mooncake", Arrivals(3, 100), seed=0, longest=4096))
    assert max(r.prompt_len + r.output_len for r in requests) <= 4096
    whole = [TraceRequest(0.0, ((1, 512), (2, 300)), 100)]
    assert cut(whole, 600) == [TraceRequest(0.0, ((1, 512), (2, 87)), 1)]
    assert cut(whole, 850) == [TraceRequest(0.0, ((1, 512), (2, 300)), 38)]
    assert cut(whole, 4096) == whole


def test_tokens_are_equal_where_runs_are() -> None:
    tokens = TraceRequest(0.0, ((7, 3), (9, 2)), 1).tokens()
    assert tokens == [7, 7, 7, 9, 9]


def test_a_trace_at_another_rate() -> None:
    requests = [TraceRequest(float(at), ((1, 4),), 2) for at in range(11)]
    assert [r.time for r in at_rate(requests, 2.0)] == [at / 2 for at in range(11)]
    with pytest.raises(ConfigError, match="at once"):
        at_rate([TraceRequest(0.0, ((1, 4),), 2)] * 2, 2.0)


# --- files ----------------------------------------------------------------------------------------


def test_azure_s_csv(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:05.0319600,110,27\n"
    )
    first, second = read_trace(str(path))
    assert (first.time, first.prompt_len, first.output_len) == (0.0, 4808, 10)
    assert (second.time, second.prompt_len) == (pytest.approx(1.052), 110)
    assert first.prompt[0][0] != second.prompt[0][0]


def test_azure_s_csv_of_2024(tmp_path: Path) -> None:
    """A byte order mark, and times in a zone, with and without fractions."""
    path = tmp_path / "azure.csv"
    stamps = ("00:00:00.009930+00:00", "00:00:01+00:00", "00:00:01.5+00:00", "00:00:02.2500")
    rows = [f"2024-05-10 {stamp},2162,5" for stamp in stamps]
    path.write_text("\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    times = [request.time for request in read_trace(str(path))]
    assert times == pytest.approx([0.0, 0.99007, 1.49007, 2.24007])


def test_mooncake_s_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [46, 47, 48]},
        {"timestamp": 3000, "input_length": 1300, "output_length": 6, "hash_ids": [46, 47]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_trace(str(path))
    assert [length for _, length in first.prompt] == [512, 512, 76]
    assert [length for _, length in second.prompt] == [512, 512, 276]
    assert first.prompt[:2] == second.prompt[:2]
    assert first.prompt[2] != second.prompt[2]
    assert second.time == 2.0


def test_a_request_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [
        {"time": "2026-11-30T10:00:05", "message": "ready"},
        {"time": "2026-11-30T10:00:09", "prompt_tokens": 7, "output_tokens": 3, "e2e_seconds": 4.0},
        {"time": "2026-11-30T10:00:10", "prompt_tokens": 9, "output_tokens": 0, "e2e_seconds": 4.0},
        {"time": "2026-11-30T10:00:08", "prompt_tokens": 8, "output_tokens": 2, "e2e_seconds": 0.5},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_trace(str(path))
    assert [(r.time, r.prompt_len, r.output_len) for r in found] == [(0.0, 7, 3), (2.5, 8, 2)]


def test_a_result_of_bench_serve(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = {
        "start_times": [0.5, 0.1, 0.9], "input_lens": [10, 20, 30], "output_lens": [1, 2, 3],
        "errors": ["", "", "refused"],
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1))
    found = read_trace(str(path))
    assert [(r.time, r.prompt_len, r.output_len) for r in found] == [(0.0, 20, 2), (0.4, 10, 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no request"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "line 2: expected TIMESTAMP"),
        ('{"timestamp": 1}\n{"hash_ids": 3}\n', "line 2: expected the fields"),
        ('{"arrival": 0, "prompt_tokens": 4, "output_tokens": 2}\n[1]\n', "line 2: expected"),
        ('{"arrival": NaN, "prompt_tokens": 4, "output_tokens": 2}\n', "line 1: expected"),
        ('{"arrival": 1, "prompt_tokens": 1e999, "output_tokens": 2}\n', "line 1: expected"),
        ('{\n "a": 1\n}', "one JSON value"),
        ('[{"conversations": []}]', "no times; give --trace sharegpt"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_trace(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(str(path) + "x")

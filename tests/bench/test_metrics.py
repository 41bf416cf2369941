"""The figures, against cases worked out by hand."""

from __future__ import annotations

import pytest

from quire.bench.client import Exchange
from quire.bench.metrics import (
    RequestTimes,
    meets,
    output_rate,
    peak_concurrency,
    request_times,
    statistics_ms,
    summary,
)


def times(
    sent: float, chunks: list[float], *, output: int, due: float | None = None, prompt: int = 10
) -> RequestTimes:
    return RequestTimes(
        due=sent if due is None else due,
        sent=sent,
        first=chunks[0],
        end=chunks[-1],
        chunks=chunks,
        prompt_len=prompt,
        output_len=output,
    )


FAILED = RequestTimes(0.0, 0.0, None, None, [], 10, 0, "HTTP 429: busy")
A = times(1.0, [1.2, 1.3, 1.5, 1.8], output=4)
B = times(1.5, [2.5, 2.6], output=11, due=1.0)
"""Two chunks with eleven tokens: TPOT is by token, ITL by chunk."""


def test_one_request() -> None:
    assert A.ttft == pytest.approx(0.2)
    assert A.e2el == pytest.approx(0.8)
    assert A.tpot == pytest.approx(0.6 / 3)
    assert A.itl == pytest.approx([0.1, 0.2, 0.3])
    assert B.tpot == pytest.approx(0.1 / 10)
    assert times(0.0, [0.5], output=1).tpot == 0.0


def test_a_run() -> None:
    result = summary([A, B, FAILED], 2.0, percentiles=[50, 99.9], slos={"ttft": 0.3, "tpot": 0.3})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 15)
    assert result["request_throughput"] == 1.0
    assert result["output_throughput"] == 7.5
    assert result["total_token_throughput"] == 17.5
    assert result["request_goodput"] == 0.5  # B's TTFT is 1 s
    assert result["mean_ttft_ms"] == pytest.approx(600)
    assert result["std_ttft_ms"] == pytest.approx(400)
    assert result["p50_itl_ms"] == pytest.approx(150)  # of 100, 100, 200, 300
    assert result["p99.9_e2el_ms"] == pytest.approx(800 + 0.999 * 300)
    assert result["max_concurrent_requests"] == 2
    assert result["tokens_per_chunk"] == 15 / 6
    # B was due half a second before the client sent it.
    assert result["mean_ttft_from_due_ms"] == pytest.approx((200 + 1500) / 2)


def test_nothing_completed_gives_zeros_not_an_error() -> None:
    result = summary([FAILED], 1.0, percentiles=[99], slos={})
    assert result["failed"] == 1 and result["mean_ttft_ms"] == 0.0
    assert result["request_goodput"] is None


def test_percentiles_interpolate_and_deviation_divides_by_n() -> None:
    figures = statistics_ms("x", [0.001, 0.002, 0.003, 0.004], [25, 90])
    assert figures["p25_x_ms"] == pytest.approx(1.75)
    assert figures["p90_x_ms"] == pytest.approx(3.7)
    assert figures["std_x_ms"] == pytest.approx(1.118, abs=1e-3)


def test_goodput_needs_every_objective() -> None:
    assert meets(A, {"ttft": 0.25, "tpot": 0.25, "e2el": 0.9})
    assert not meets(A, {"ttft": 0.25, "tpot": 0.1})
    assert not meets(FAILED, {})


def test_tokens_over_time_sum_to_the_tokens() -> None:
    rates = output_rate([A, B], width=0.5)
    assert sum(rates) * 0.5 == pytest.approx(15)
    assert rates[2:4] == [4.0, 4.0]  # 1.0 to 1.5 s: two of A's; 1.5 to 2.0 s: two more
    assert output_rate([]) == []


def test_a_request_that_begins_as_another_ends_is_not_beside_it() -> None:
    assert peak_concurrency([times(0, [1.0], output=1), times(1.0, [2.0], output=1)]) == 1


def exchange(**fields: object) -> Exchange:
    made = Exchange(sent=10.0)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_tokens_are_the_servers_count_or_counted_again() -> None:
    seen = exchange(chunk_times=[11.0, 12.0], texts=["a b", " c"], finished=12.5)
    counted = request_times(
        seen, due=9.0, zero=8.0, prompt_len=7, count=lambda text: len(text.split())
    )
    assert (counted.output_len, counted.prompt_len) == (3, 7)
    assert (counted.due, counted.sent, counted.first, counted.end) == (1.0, 2.0, 3.0, 4.5)
    seen.completion_tokens, seen.prompt_tokens = 5, 9
    told = request_times(seen, due=9.0, zero=8.0, prompt_len=7, count=len)
    assert (told.output_len, told.prompt_len) == (5, 9)


def test_without_text_the_end_is_the_first_sign() -> None:
    seen = exchange(finished=10.4, completion_tokens=1)
    assert request_times(seen, due=10, zero=10, prompt_len=1, count=len).ttft == pytest.approx(0.4)

"""From the client's exchanges to the usual figures. Definitions, in seconds:

    TTFT   first chunk with output - sent (or the finish reason, if no text came)
    E2EL   last chunk with a choice - sent
    ITL    gaps between successive chunks with output; a chunk of several tokens is one gap, as in vLLM
    TPOT   (E2EL - TTFT) / (output tokens - 1), for requests with more than one

Output tokens are the server's count (usage); if it sends none, the text is tokenized again. Failed
requests are in `failed` only, not in latencies or throughput. Standard deviations divide by n, and
percentiles interpolate linearly, as NumPy's defaults do. `goodput` counts completed requests that meet
every objective; a request of one token has a TPOT of 0.

`*_from_due` latencies start when the request was due and not when it was sent: with `max_concurrency`, or
a client that lags, they include the wait before sending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quire.bench.client import Exchange

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request, in seconds from the schedule's zero."""

    due: float
    sent: float
    first: float | None
    end: float | None
    chunks: list[float]
    """When each chunk with output came."""
    prompt_len: int
    output_len: int
    error: str = ""
    cached_len: int = 0
    """Prompt tokens that the server's prefix cache had, as it reports; 0 if it does not."""

    @property
    def itl(self) -> list[float]:
        return [late - early for early, late in pairwise(self.chunks)]

    @property
    def ttft(self) -> float:
        return (self.first or self.sent) - self.sent

    @property
    def e2el(self) -> float:
        return (self.end or self.sent) - self.sent

    @property
    def tpot(self) -> float:
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


def request_times(
    exchange: Exchange, *, due: float, zero: float, prompt_len: int, count: Count
) -> RequestTimes:
    """due, zero: `perf_counter` seconds. prompt_len: the dataset's count, used if the server sends none.
    count: the function that counts a text's tokens, called only if usage is missing."""
    sent = exchange.sent - zero
    if exchange.error:
        return RequestTimes(due - zero, sent, None, None, [], prompt_len, 0, exchange.error)
    stamps = exchange.chunk_times
    first = (stamps[0] if stamps else exchange.finished) or exchange.sent
    tokens = exchange.completion_tokens
    return RequestTimes(
        due=due - zero,
        sent=sent,
        first=first - zero,
        end=max(exchange.finished, first) - zero,
        chunks=[stamp - zero for stamp in stamps],
        prompt_len=exchange.prompt_tokens or prompt_len,
        output_len=count(exchange.text) if tokens is None else tokens,
        cached_len=exchange.cached_tokens or 0,
    )


def meets(times: RequestTimes, slos: Mapping[str, float]) -> bool:
    """Whether a completed request meets every objective. slos: seconds by ttft, tpot, e2el."""
    return not times.error and all(getattr(times, name) <= limit for name, limit in slos.items())


def summary(
    requests: Sequence[RequestTimes],
    duration: float,
    *,
    percentiles: Sequence[float],
    slos: Mapping[str, float],
) -> dict[str, object]:
    """The result's keys, vLLM's names first; times in milliseconds. duration: seconds, above 0."""
    done = [times for times in requests if not times.error]
    prompt = sum(times.prompt_len for times in done)
    output = sum(times.output_len for times in done)
    good = sum(meets(times, slos) for times in done)
    result: dict[str, object] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if slos else None,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": max([output / max(duration, 1.0), *output_rate(done)]),
        "max_concurrent_requests": peak_concurrency(done),
    }
    values = {
        "ttft": [times.ttft for times in done],
        "tpot": [times.tpot for times in done if times.output_len > 1],
        "itl": [gap for times in done for gap in times.itl],
        "e2el": [times.e2el for times in done],
        "client_lag": [times.sent - times.due for times in requests],
        "ttft_from_due": [times.ttft + times.sent - times.due for times in done],
        "e2el_from_due": [times.e2el + times.sent - times.due for times in done],
    }
    for name, seconds in values.items():
        result |= statistics_ms(name, seconds, percentiles)
    chunks = sum(len(times.chunks) for times in done)
    result["tokens_per_chunk"] = output / chunks if chunks else 0.0
    return result


def statistics_ms(
    name: str, seconds: Sequence[float], percentiles: Sequence[float]
) -> dict[str, object]:
    """mean_, median_, std_ and pNN_ of one metric in milliseconds; zeros if there is nothing."""
    import numpy as np

    values = np.asarray(seconds or [0.0]) * 1e3
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        **{
            f"p{percentile:g}_{name}_ms": float(np.percentile(values, percentile))
            for percentile in percentiles
        },
    }


def peak_concurrency(requests: Sequence[RequestTimes]) -> int:
    """The largest number of requests in flight at one moment."""
    edges = [(times.sent, 1) for times in requests]
    edges += [(times.end or times.sent, -1) for times in requests]
    running = most = 0
    for _, step in sorted(edges):  # at the same moment, ends come first: -1 sorts before 1
        running += step
        most = max(most, running)
    return most


def output_rate(requests: Sequence[RequestTimes], *, width: float = 1.0) -> list[float]:
    """Output tokens per second in each interval of `width` seconds from the schedule's zero. A request's
    tokens are spread evenly over its chunks."""
    totals: dict[int, float] = {}
    for times in requests:
        share = times.output_len / len(times.chunks) if times.chunks else 0.0
        for stamp in times.chunks:
            slot = int(max(stamp, 0.0) // width)
            totals[slot] = totals.get(slot, 0.0) + share
    return [totals.get(slot, 0.0) / width for slot in range(max(totals, default=-1) + 1)]

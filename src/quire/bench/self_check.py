"""Measures the load client against the null server: the highest rate, and the error of its time stamps.

The server runs in its own process on the same machine and writes its time into every chunk, so the error
is measured: the time of receiving minus the time of writing. It includes the loopback interface and the
scheduling of both processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise

from quire.bench.client import HttpPool
from quire.bench.load import LoadResult, allow_many_sockets, run_async, run_load
from quire.bench.metrics import statistics_ms
from quire.bench.null_server import NullOptions, serve_null
from quire.errors import EngineError

BODY = b'{"model":"null","prompt":"x","max_tokens":1,"stream":true}'
PERCENTILES = (50.0, 99.0)


def check_client(
    *, requests: int, concurrency: int, rate: float, seconds: float
) -> list[dict[str, object]]:
    """Three rows: short answers, long answers, and answers paced at 20 ms with stamps."""
    long = max(requests // 16, 1)
    paced = max(round(rate * seconds), 1)
    interval, chunks = 0.02, 50
    return [
        _saturate("requests", NullOptions(chunks=1), requests, concurrency),
        _saturate("chunks", NullOptions(chunks=256), long, concurrency),
        _pace(NullOptions(chunks=chunks, interval=interval, stamp=True), paced, rate),
    ]


def _saturate(name: str, options: NullOptions, count: int, concurrency: int) -> dict[str, object]:
    with null_server(options) as url:
        result, cpu = run_async(_drive(url, count, [0.0] * count, concurrency))
    chunks = sum(len(exchange.chunk_times) for exchange in result.exchanges)
    return {
        "check": name,
        "server": asdict(options),
        "requests": count,
        "concurrency": concurrency,
        "failed": _failed(result),
        "requests_per_s": count / result.duration,
        "chunks_per_s": chunks / result.duration,
        "client_cpu_share": cpu / result.duration,
        "client_cpu_us_per_request": cpu / count * 1e6,
        "client_cpu_us_per_chunk": cpu / max(chunks, 1) * 1e6,
    }


def _pace(options: NullOptions, count: int, rate: float) -> dict[str, object]:
    with null_server(options) as url:
        times = [number / rate for number in range(count)]
        result, cpu = run_async(_drive(url, count, times, None))
    delays, gaps, first = [], [], []
    for exchange in result.exchanges:
        if exchange.error:
            continue
        written = [int(text) * 1e-9 for text in exchange.texts]
        late = [seen - stamp for seen, stamp in zip(exchange.chunk_times, written, strict=True)]
        delays += late
        first.append(late[0])
        gaps += [abs(b - a) for a, b in pairwise(late)]
    lag = [e.sent - due for e, due in zip(result.exchanges, result.due, strict=True)]
    return {
        "check": "pace",
        "server": asdict(options),
        "requests": count,
        "rate": rate,
        "failed": _failed(result),
        "chunks_per_s": len(delays) / result.duration,
        "client_cpu_share": cpu / result.duration,
        **statistics_ms("chunk_delay", delays, PERCENTILES),
        **statistics_ms("ttft_error", first, PERCENTILES),
        **statistics_ms("itl_error", gaps, PERCENTILES),
        **statistics_ms("client_lag", lag, PERCENTILES),
    }


async def _drive(
    url: str, count: int, times: Sequence[float], concurrency: int | None
) -> tuple[LoadResult, float]:
    """Runs the load; returns its result and the client's processor seconds."""
    allow_many_sockets()
    pool = HttpPool(url)
    request = pool.prepare("/v1/completions", BODY)
    warm = min(count, concurrency or 16)
    await run_load(pool, [request] * warm, [0.0] * warm)
    before = time.process_time()
    result = await run_load(pool, [request] * count, times, max_concurrency=concurrency)
    cpu = time.process_time() - before
    pool.close()
    return result, cpu


def _failed(result: LoadResult) -> int:
    return sum(bool(exchange.error) for exchange in result.exchanges)


@contextmanager
def null_server(options: NullOptions) -> Iterator[str]:
    """The address of a null server in its own process, which ends with the block."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(options, sender), daemon=True)
    process.start()
    try:
        if not receiver.poll(30):
            raise EngineError("the null server did not start within 30 s.")
        yield f"http://127.0.0.1:{receiver.recv()}"
    finally:
        process.kill()
        process.join()


def _serve(options: NullOptions, sender: object) -> None:
    run_async(serve_null(options, on_ready=sender.send))  # type: ignore[attr-defined]

"""What `quire bench`'s own HTTP client gains over a general library, against the same null server.

    PYTHONPATH=src python bench/clients.py [--repeats 5]

httpx reads the same streams line by line and decodes the same JSON. Runs alternate; medians are printed. The
server runs in another process on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable

from quire.bench.client import HttpPool
from quire.bench.load import run_async, run_load
from quire.bench.null_server import NullOptions
from quire.bench.record import run_record
from quire.bench.self_check import BODY, null_server

CONCURRENCY = 64
CHUNKS = 256


async def ours(url: str, count: int) -> int:
    pool = HttpPool(url)
    request = pool.prepare("/v1/completions", BODY)
    result = await run_load(pool, [request] * count, [0.0] * count, max_concurrency=CONCURRENCY)
    pool.close()
    return sum(len(exchange.chunk_times) for exchange in result.exchanges)


async def with_httpx(url: str, count: int) -> int:
    import httpx

    gate = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one() -> int:
            seen = 0
            async with gate, client.stream("POST", f"{url}/v1/completions", content=BODY) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        seen += bool(choices and choices[0]["text"])
            return seen

        return sum(await asyncio.gather(*(one() for _ in range(count))))


def rate(client: Callable[[str, int], Awaitable[int]], url: str, count: int) -> float:
    start = time.perf_counter()

    async def main() -> int:
        return await client(url, count)

    chunks = run_async(main())
    if chunks != count * CHUNKS:
        raise SystemExit(f"{client.__name__}: {chunks} chunks of {count * CHUNKS}")
    return chunks / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"ours": [], "httpx": []}
    with null_server(NullOptions(chunks=CHUNKS)) as url:
        for _ in range(args.repeats):
            rates["ours"].append(rate(ours, url, 640))
            rates["httpx"].append(rate(with_httpx, url, 64))
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    print(json.dumps({"chunks_per_s": medians, "record": run_record()}, indent=1))


if __name__ == "__main__":
    main()

"""How steadily tokens come while long prompts are computed: one server against a prefill and a decode
instance behind `quire pd-proxy`, on the same cores.

    python -m bench.disaggregation --model DIR [--seconds 20] [--rounds 3] [--lock FILE] [--json FILE]

`--streams` clients read answers of 200 tokens to short prompts, one after the other, without a pause. Another
client sends prompts of `--prompt` tokens, each new, waits for 8 tokens, and pauses for `--pause` seconds.
All prompts are random ids, so nothing is cached. ITL is the time between two chunks of the first clients.
Layouts take turns in each round, with processes of their own: `whole` is one server without chunked prefill,
`default` one server as it is, `chunks` one with steps of 256 tokens, `P/D` two servers with half the cores
each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
from bench.parallel import held
from bench.peers.client import percentile

from quire.bench.client import Exchange, HttpPool
from quire.bench.record import run_record
from quire.cli.demo.server import ServerProcess, scratch_folder

ANSWER, LONG_ANSWER, SHORT = 200, 8, 24
OPTIONS: dict[str, object] = {
    "max_model_len": 4096, "kv_cache_memory_bytes": "512M", "max_num_seqs": 16,
}  # fmt: skip
KV_PORT = 28_600
NONE = [math.nan]


@dataclass(slots=True)
class Run:
    """What one layout did in one round."""

    gaps: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    """Of the long prompts."""
    tokens: int = 0
    """Generated for the first clients."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        return {
            "itl_p50_ms": 1e3 * percentile(self.gaps or NONE, 50),
            "itl_p99_ms": 1e3 * percentile(self.gaps or NONE, 99),
            "itl_max_ms": 1e3 * max(self.gaps or NONE),
            "long_ttft_s": statistics.median(self.ttfts or NONE),
            "long_prompts_per_minute": 60 * len(self.ttfts) / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "cpu_s_per_s": self.cpu_seconds / self.seconds,
        }


def prefer(pid: int) -> None:
    """This process and its descendants before others (Linux; needs the right to)."""
    for each in descent(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{each.pid}/autogroup").write_text("-10")


def descent(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


@contextlib.contextmanager
def one_server(options: Mapping[str, object], folder: Path) -> Iterator[tuple[str, list[int]]]:
    server = ServerProcess.start(OPTIONS | options, folder)
    try:
        asyncio.run(server.wait_ready())
        prefer(server.pid)
        yield server.url, [server.pid]
    finally:
        server.stop()


@contextlib.contextmanager
def two_servers(
    model: str | None, folder: Path, options: Mapping[str, object] = {}
) -> Iterator[tuple[str, list[int]]]:
    """P, D and the proxy. options: of both."""
    base = {"kv_connector": "TCPConnector", "kv_port": KV_PORT}
    extra = {"peers": [f"127.0.0.1:{KV_PORT}"]}
    roles = {
        "p": base | {"kv_role": "kv_producer"},
        "d": base | {"kv_role": "kv_consumer", "kv_connector_extra_config": extra},
    }
    half = max(1, (os.cpu_count() or 2) // 2)
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, config in roles.items():
            (folder / name).mkdir()
            mine = {"model": model, "cpu_threads": half, "kv_transfer_config": config, **options}
            sides[name] = stack.enter_context(one_server(mine, folder / name))
        port = KV_PORT + 1
        words = ["--prefill", sides["p"][0], "--decode", sides["d"][0], "--port", str(port)]
        proxy = subprocess.Popen(
            [sys.executable, "-m", "quire", "pd-proxy", *words],
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(until_up(url))
            prefer(proxy.pid)
            yield url, [*sides["p"][1], *sides["d"][1], proxy.pid]
        finally:
            proxy.send_signal(signal.SIGTERM)
            proxy.wait(60)


async def until_up(url: str) -> None:
    pool = HttpPool(url)
    while (await pool.ask(pool.prepare("/health"))).status != 200:
        await asyncio.sleep(0.05)
    pool.close()


LAYOUTS: dict[str, dict[str, object]] = {
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
    "default": {},
    "chunks": {"max_num_batched_tokens": 256},
    "P/D": {},
}


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(300, 4000) for _ in range(count)]


async def ask(pool: HttpPool, prompt: Sequence[int], tokens: int, seed: int) -> Exchange:
    body = {
        "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": seed,
        "temperature": 1.0,
    }  # fmt: skip
    exchange = await pool.ask(pool.prepare("/v1/completions", msgspec.json.encode(body)))
    assert not exchange.error, exchange.error
    return exchange


async def load(url: str, args: argparse.Namespace, seed: int) -> Run:
    run, pool, rng = Run(), HttpPool(url), random.Random(seed)
    over = asyncio.Event()

    async def read() -> None:
        while not over.is_set():
            exchange = await ask(pool, ids(rng, SHORT), ANSWER, rng.randrange(1 << 30))
            times = exchange.chunk_times
            run.gaps += [b - a for a, b in itertools.pairwise(times)]
            run.tokens += ANSWER

    async def prompt() -> None:
        while not over.is_set():
            exchange = await ask(pool, ids(rng, args.prompt), LONG_ANSWER, rng.randrange(1 << 30))
            run.ttfts.append(exchange.chunk_times[0] - exchange.sent)
            await asyncio.sleep(args.pause)

    began = time.perf_counter()
    clients = [asyncio.ensure_future(read()) for _ in range(args.streams)]
    if args.prompt:
        clients.append(asyncio.ensure_future(prompt()))
    await asyncio.sleep(args.seconds)
    over.set()
    await asyncio.gather(*clients)
    run.seconds = time.perf_counter() - began
    pool.close()
    return run


def cpu_seconds(pids: Sequence[int]) -> float:
    """Of processes and their descendants."""
    each = {p.pid: p for pid in pids for p in descent(pid)}
    return sum(sum(p.cpu_times()[:2]) for p in each.values())


def measure(layout: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    with held(args.lock), scratch_folder() as folder:
        prefer(os.getpid())
        options = {"model": args.model} | LAYOUTS[layout]
        server = (
            two_servers(args.model, Path(folder))
            if layout == "P/D"
            else one_server(options, Path(folder))
        )
        with server as (url, pids):
            asyncio.run(load(url, argparse.Namespace(**vars(args) | {"seconds": 1}), seed + 1))
            before = cpu_seconds(pids)
            run = asyncio.run(load(url, args, seed))
            run.cpu_seconds = cpu_seconds(pids) - before
    return run.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a long prompt; 0: none")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--lock", help="a file that measurements on this machine lock")
    parser.add_argument("--json", help="write the record to this file")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {layout: [] for layout in args.layouts}
    for number in range(args.rounds):
        for layout in args.layouts:
            found[layout].append(measure(layout, args, number))
            print(
                number, layout, {k: round(v, 2) for k, v in found[layout][-1].items()}, flush=True
            )
    medians = {
        layout: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for layout, runs in found.items()
    }
    names = list(next(iter(medians.values())))
    print("| layout | " + " | ".join(names) + " |")
    for layout, values in medians.items():
        print(f"| {layout} | " + " | ".join(f"{values[name]:.2f}" for name in names) + " |")
    if args.json:
        record = run_record() | {"medians": medians, "runs": found, "options": vars(args)}
        Path(args.json).write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()

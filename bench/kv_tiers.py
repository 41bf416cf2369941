"""The figures of docs/kv-cache.md: what tiers of KV gain and cost.

    python -m bench.kv_tiers [FIGURE ...] [--model DIR] [--rounds 5] [--json FILE]

Engines that are compared live at the same time and take turns, so that what else runs on the machine
disturbs all alike. Without --model, the built-in one. A figure's `reach` is what is wanted of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import glob
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from bench.peers.workloads import NUM_SPECIAL_TOKENS, build

from quire import LLM, SamplingParams
from quire.bench.record import run_record
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.kvtransfer.codec import Codec
from quire.kvtransfer.disk import DiskTier
from quire.metrics import NullMetrics
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind

PREFIX, BUILT_IN_PREFIX, SUFFIX = 2048, 1920, 16
"""Tokens. The built-in model's context is 2,048."""
BLOCK_SIZE = 16
SETTLE_SECONDS = 0.5
"""Until blocks that were saved are in the tiers."""
Result = dict[str, Any]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.model: str | None = args.model
        self.rounds: int = args.rounds
        self.prefix = BUILT_IN_PREFIX if self.model is None else PREFIX
        self.max_model_len = self.prefix + 2 * SUFFIX
        self.one_sequence = self.max_model_len // BLOCK_SIZE + 2
        """Blocks of a pool that holds about one: with the null block and one to spare."""
        self.folder = Path(args.folder)
        self._random = random.Random(16)
        self._number = itertools.count()

    def engine(self, **options: Any) -> LLM:
        settings: dict[str, Any] = {"max_model_len": self.max_model_len, "cpu_threads": 2} | options
        return LLM(self.model, **settings)

    def ram(self, **options: Any) -> LLM:
        return self.engine(swap_space=2.0, **options)

    def disk(self, **options: Any) -> LLM:
        return self.engine(kv_disk_path=self.new_folder(), kv_disk_size=4.0, **options)

    def new_folder(self) -> str:
        return str(self.folder / f"kv{next(self._number)}")

    def tokens(self, count: int) -> list[int]:
        return self._random.choices(range(NUM_SPECIAL_TOKENS, 4000), k=count)

    @contextlib.contextmanager
    def engines(self, makers: dict[str, Callable[..., LLM]], **options: Any) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            found = {}
            for name, make in makers.items():
                found[name] = make(**options)
                stack.callback(found[name].close)
            yield found

    def turns(self, engines: dict[str, Any], round_: int) -> list[tuple[str, Any]]:
        """In another order in each round."""
        listed = list(engines.items())
        first = round_ % len(listed)
        return listed[first:] + listed[:first]


def ask(llm: LLM, prompt: Sequence[int], max_tokens: int = 1) -> RequestOutput:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == max_tokens, output.error
    return output


def core_of(llm: LLM) -> Any:
    return llm._core._core  # type: ignore[union-attr]


def tiers_of(llm: LLM) -> Any:
    return core_of(llm).executor.store.tiers


def drop_pages(folder: str) -> None:
    """The system forgets these files, so that they are read from the disk."""
    os.sync()
    for file in glob.glob(f"{folder}/*/*.kv"):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def ttft(bench: Bench) -> list[Result]:
    """Time to the first token of a prompt of 2,048 + 16 tokens whose prefix is in a tier."""
    folder = bench.new_folder()

    def disk(**options: Any) -> LLM:
        return bench.engine(kv_disk_path=folder, kv_disk_size=4.0, **options)

    makers = {"recompute": bench.engine, "ram": bench.ram, "disk": disk}
    seconds: dict[str, list[float]] = {name: [] for name in [*makers, "cold disk"]}
    prefixes = [bench.tokens(bench.prefix) for _ in range(2)]
    with bench.engines(makers, num_gpu_blocks_override=bench.one_sequence) as engines:
        for llm in engines.values():
            for prefix in prefixes * 2:
                ask(llm, prefix + bench.tokens(SUFFIX))
                time.sleep(SETTLE_SECONDS)
        for round_ in range(bench.rounds):
            for name, llm in bench.turns(engines, round_):
                for label in ("disk", "cold disk") if name == "disk" else (name,):
                    for prefix in prefixes:
                        if label == "cold disk":
                            drop_pages(folder)
                        output = ask(llm, prefix + bench.tokens(SUFFIX))
                        found = output.num_cached_tokens or 0
                        is_hit = name != "recompute"
                        assert found == bench.prefix if is_hit else found < 100, (label, found)
                        seconds[label].append(output.metrics.first_token_latency)
                        time.sleep(0.1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reach = {"ram": 0.15, "disk": 0.25, "cold disk": 0.25}
    return [
        {
            "figure": f"TTFT of a hit, {name}",
            "value": medians[name] / medians["recompute"],
            "reach": f"<= {reach[name]}",
            "ms": medians[name] * 1e3,
            "recompute_ms": medians["recompute"] * 1e3,
            "all_ms": [value * 1e3 for value in seconds[name]],
        }
        for name in reach
    ]


def chat(
    bench: Bench,
    sessions: int = 4,
    turns: int = 20,
    document: int = 1024,
    said: int = 24,
    answer: int = 24,
) -> list[Result]:
    """Sessions of 20 turns that take turns, with a working set of 4 times the pool in the end."""
    longest = document + turns * (said + answer)
    blocks = longest // BLOCK_SIZE + 3
    length = {"max_model_len": longest}
    small = {"num_gpu_blocks_override": blocks} | length

    makers = {
        "endless": lambda **_: bench.engine(
            num_gpu_blocks_override=sessions * blocks + 8, **length
        ),
        "none": lambda **_: bench.engine(**small),
        "ram": lambda **_: bench.ram(**small),
        "disk": lambda **_: bench.disk(**small),
    }
    with bench.engines(makers) as engines:
        history = [bench.tokens(document) for _ in range(sessions)]
        seconds, cached = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        asked = 0
        for turn in range(turns):
            for prompt in history:
                prompt += bench.tokens(said)
            answers = {}
            for name, llm in bench.turns(engines, turn):
                started = time.perf_counter()
                outputs = [ask(llm, prompt, answer) for prompt in history]
                seconds[name] += time.perf_counter() - started
                cached[name] += sum(each.num_cached_tokens or 0 for each in outputs)
                answers[name] = [list(each.outputs[0].token_ids) for each in outputs]
                assert answers[name] == next(iter(answers.values())), f"{name} changed a token"
            asked += sum(map(len, history))
            for prompt, said_back in zip(history, answers["none"], strict=True):
                prompt += said_back
    rates = {name: value / asked for name, value in cached.items()}
    results = []
    for name in ("ram", "disk"):
        results += [
            {
                "figure": f"chat: hit rate / endless pool's, {name}",
                "value": rates[name] / rates["endless"],
                "reach": ">= 0.9",
                "hit_rates": rates,
            },
            {
                "figure": f"chat: throughput / without tiers, {name}",
                "value": seconds["none"] / seconds[name],
                "reach": ">= 2",
                "seconds": seconds,
            },
        ]
    return results


class Gaps(NullMetrics):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_token_gap(self, seconds: float) -> None:
        self.seconds.append(seconds)


STREAMS, STREAM_TOKENS = 4, 256


async def gaps(
    engine: AsyncLLM, bench: Bench, seconds: float, visits: Sequence[list[int]]
) -> tuple[list[float], int]:
    """The time between tokens of some streams while prompts come in turns, one every half second; and the
    number of tokens of these prompts that were found."""
    found = Gaps()
    engine.attach_metrics(found)
    until = time.perf_counter() + seconds
    params = SamplingParams(
        temperature=0.0,
        max_tokens=STREAM_TOKENS,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    one = params.replace(max_tokens=1)
    cached = 0

    async def stream() -> None:
        while time.perf_counter() < until:
            running = engine.submit({"prompt_token_ids": bench.tokens(SUFFIX)}, params)
            async for _ in running:
                if time.perf_counter() >= until:
                    running.abort()
                    break

    async def visit() -> None:
        nonlocal cached
        for prompt in itertools.cycle(visits):
            began = time.perf_counter()
            if began >= until:
                break
            async for output in engine.submit({"prompt_token_ids": prompt}, one):
                cached += output.num_cached_tokens or 0
            await asyncio.sleep(max(0.0, began + 0.5 - time.perf_counter()))

    await asyncio.gather(*(stream() for _ in range(STREAMS)), visit())
    return found.seconds, cached


async def measure_itl(bench: Bench, seconds: float) -> list[Result]:
    streams = STREAMS * ((SUFFIX + STREAM_TOKENS) // BLOCK_SIZE + 1)
    prefixes = [bench.tokens(bench.prefix + 1) for _ in range(2)]

    async def start(**options: Any) -> AsyncLLM:
        settings = {
            "max_model_len": bench.max_model_len,
            "cpu_threads": 2,
            "disable_log_stats": True,
        }
        if bench.model is not None:
            settings["model"] = bench.model
        return await AsyncLLM.start(from_flat(settings | options))

    small = {"num_gpu_blocks_override": bench.one_sequence + streams}
    disk = {"kv_disk_path": bench.new_folder(), "kv_disk_size": 4.0}
    engines = {
        "cached": await start(num_gpu_blocks_override=4 * bench.one_sequence + streams),
        "ram": await start(**small, swap_space=2.0),
        "disk": await start(**small, **disk),
    }
    found: dict[str, list[float]] = {name: [] for name in ["quiet", *engines]}
    hits = dict.fromkeys(found, 0)
    try:
        for engine in engines.values():
            await gaps(engine, bench, 4.0, prefixes)
        for round_ in range(bench.rounds):
            for name, engine in bench.turns({"quiet": engines["cached"]} | engines, round_):
                some, cached = await gaps(
                    engine, bench, seconds, [] if name == "quiet" else prefixes
                )
                found[name] += some
                hits[name] += cached
    finally:
        for engine in engines.values():
            await engine.shutdown()
    p99 = {name: float(np.percentile(values, 99)) * 1e3 for name, values in found.items()}
    p50 = {name: float(np.percentile(values, 50)) * 1e3 for name, values in found.items()}
    return [
        {
            "figure": f"ITL p99 of others while loading / while hitting, {name}",
            "value": p99[name] / p99["cached"],
            "reach": "<= 1.2",
            "p99_ms": p99,
            "p50_ms": p50,
            "tokens_found": hits,
        }
        for name in ("ram", "disk")
    ]


def itl(bench: Bench) -> list[Result]:
    """Time between tokens of four streams, while a prefix of 2,048 is loaded twice a second."""
    return asyncio.run(measure_itl(bench, 5.0))


def write_through(bench: Bench) -> list[Result]:
    """W1 of bench.peers: 64 requests at once, all of whose blocks are saved when they end."""
    options = {"max_num_seqs": 64, "kv_write_policy": "write_through"}
    makers = {
        "none": lambda **_: bench.engine(max_num_seqs=64),
        "ram": bench.ram,
        "disk": bench.disk,
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    with bench.engines(makers, **options) as engines:
        for round_ in range(-1, bench.rounds):
            requests = build("W1", 4000, round_)
            prompts = [{"prompt_token_ids": each.prompt} for each in requests]
            params = [
                SamplingParams(temperature=0.0, max_tokens=each.max_tokens, ignore_eos=True)
                for each in requests
            ]
            for name, llm in bench.turns(engines, round_):
                started = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                if round_ >= 0:
                    seconds[name].append(time.perf_counter() - started)
                time.sleep(2 * SETTLE_SECONDS)
    results = []
    for name in ("ram", "disk"):
        ratios = [a / b for a, b in zip(seconds["none"], seconds[name], strict=True)]
        results.append(
            {
                "figure": f"throughput with write-through / without, {name}",
                "value": statistics.median(ratios),
                "reach": ">= 0.97",
                "ratios": ratios,
                "seconds": seconds,
            }
        )
    return results


def capacity(bench: Bench) -> list[Result]:
    """How much more KV of prose the RAM tier holds than its size in bytes."""
    prose = "\n".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    with bench.engines({"ram": bench.ram}, kv_write_policy="write_through") as engines:
        llm = engines["ram"]
        ids = llm.get_tokenizer().encode(prose)
        for start in range(0, min(len(ids), 20 * bench.prefix), bench.prefix):
            ask(llm, ids[start : start + bench.prefix])
        time.sleep(2 * SETTLE_SECONDS)
        (tier,) = tiers_of(llm)
        size = core_of(llm).executor.store._memory.block_bytes
        held, used = len(tier) * size, tier.num_bytes
    return [
        {
            "figure": "compressed capacity",
            "value": held / used,
            "reach": ">= 1.4",
            "blocks": held // size,
            "block_bytes": size,
        }
    ]


def restart(bench: Bench) -> list[Result]:
    """A GiB on disk, found again; and the first hit of a new engine."""
    results: list[Result] = []
    for block_bytes in (32 << 10, 192 << 10):
        data = np.random.default_rng(0).integers(0, 256, (64, block_bytes), np.uint8)
        folder = bench.new_folder()

        def opened(folder: str = folder, block_bytes: int = block_bytes) -> DiskTier:
            options: dict[str, Any] = {"fingerprint": b"bench", "share": "0"}
            return DiskTier(
                folder, 3 << 30, block_bytes=block_bytes, codec=Codec(2, None), **options
            )

        tier = opened()
        count = (1 << 30) // block_bytes
        for number in range(count):
            assert tier.put((sha256(b"%d" % number).digest(), 0), data[number % 64])
        tier.close()
        seconds = []
        for _ in range(bench.rounds):
            drop_pages(folder)
            started = time.perf_counter()
            tier = opened()
            assert tier.wait_indexed()
            seconds.append(time.perf_counter() - started)
            assert len(tier) == count
            tier.close()
        figure = {"figure": f"seconds to index a GiB, blocks of {block_bytes >> 10} KiB, cold"}
        results.append(
            figure | {"value": statistics.median(seconds), "reach": "<= 1", "all": seconds}
        )
    folder = bench.new_folder()
    options = {"kv_disk_path": folder, "kv_disk_size": 4.0, "kv_write_policy": "write_through"}
    ratios = []
    for _ in range(bench.rounds):
        prompt = bench.tokens(bench.prefix)
        took = []
        for number in range(2):
            llm = bench.engine(**options)
            ask(llm, bench.tokens(bench.prefix))  # memory is touched
            output = ask(llm, prompt + bench.tokens(SUFFIX))
            assert output.num_cached_tokens == number * bench.prefix
            took.append(output.metrics.first_token_latency)
            llm.close()
        ratios.append(took[1] / took[0])
    figure = {"figure": "TTFT of the first hit after a restart", "value": statistics.median(ratios)}
    return [*results, figure | {"reach": "<= 0.25", "ratios": ratios}]


def lookup(bench: Bench) -> list[Result]:
    """What the scheduler pays for asking whether a block is in a tier."""
    with bench.engines({"ram": bench.ram}, kv_write_policy="write_through") as engines:
        llm = engines["ram"]
        prompt = bench.tokens(bench.prefix)
        ask(llm, prompt, 8)
        ask(llm, bench.tokens(SUFFIX))
        time.sleep(SETTLE_SECONDS)
        core = core_of(llm)
        connector = core.scheduler.loading._connector
        (tier,) = tiers_of(llm)
        names = list(tier._entries)
        seconds = []
        for _ in range(200):
            started = time.perf_counter()
            count = connector.lookup(names)
            seconds.append((time.perf_counter() - started) / len(names))
            assert count == len(names)
    value = statistics.median(seconds) * 1e6
    return [{"figure": "lookup, us a block", "value": value, "reach": "<= 2", "blocks": len(names)}]


FIGURES: dict[str, Callable[[Bench], list[Result]]] = {
    each.__name__: each for each in (ttft, chat, itl, write_through, capacity, restart, lookup)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("figures", nargs="*", help=f"default: all of {', '.join(FIGURES)}")
    parser.add_argument("--model", help="a checkpoint's directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where disk tiers are made; default: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = folder
        for name in args.figures or FIGURES:
            for result in FIGURES[name](Bench(args)):
                results.append(result)
                print(
                    f"{result['figure']:<64} {result['value']:8.3f}  {result['reach']}", flush=True
                )
    if args.json:
        args.json.write_text(
            json.dumps({"results": results, "record": run_record()}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

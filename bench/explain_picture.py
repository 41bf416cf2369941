"""The picture of docs/explain.md: requests that wait for each other, on the built-in model.

    python bench/explain_picture.py docs/images/explain.svg

A small cache and a small budget make in a second what a large server has in an hour. Prints the explanation
of the request that waited longest; with `--record FILE` the record is kept, for `quire explain FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

import msgspec

from quire import SamplingParams
from quire.cli.timeline_picture import picture
from quire.config import EngineConfig, from_flat
from quire.engine.async_llm import AsyncLLM
from quire.scheduler.explain import slowest
from quire.scheduler.record_reader import read
from quire.scheduler.timeline import timeline

OPTIONS = {
    "max_model_len": 2048, "num_gpu_blocks_override": 250, "max_num_seqs": 12,
    "max_num_batched_tokens": 128,
}  # fmt: skip
REQUESTS = [
    # seconds, tokens of the prompt, tokens to generate
    (0.00, 40, 260), (0.01, 60, 250), (0.02, 50, 240), (0.03, 1900, 60), (0.04, 1300, 90),
    (0.05, 90, 40), (0.06, 700, 100), (0.09, 300, 160), (0.10, 80, 60), (0.12, 1200, 60),
    (0.15, 40, 80), (0.20, 60, 60), (0.25, 500, 50), (0.30, 40, 60), (0.36, 90, 60),
]  # fmt: skip


async def run() -> bytes:
    """The record."""
    llm = await AsyncLLM.start(_config())
    chance = random.Random(1)

    async def ask(after: float, prompt: int, output: int) -> None:
        await asyncio.sleep(after)
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        tokens = [chance.randrange(300, 4000) for _ in range(prompt)]
        async for _ in llm.submit(tokens, params):
            pass

    try:
        await ask(0.0, 300, 4)  # the first steps of a process are slow
        await asyncio.sleep(0.3)
        await asyncio.gather(*(ask(*each) for each in REQUESTS))
        return (await llm.records())[0]
    finally:
        await llm.shutdown()


def _config() -> EngineConfig:
    return from_flat(OPTIONS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("svg")
    parser.add_argument("--record")
    args = parser.parse_args()
    data = asyncio.run(run())
    if args.record:
        Path(args.record).write_bytes(data)
    history = read(data)
    slow = slowest(history, 1)[0]
    trace = msgspec.json.decode(msgspec.json.encode(timeline([history])))
    Path(args.svg).write_text(picture(trace, f"r{slow.request_id}"), encoding="utf-8")
    print(slow)


if __name__ == "__main__":
    main()

"""Agents that pause for their tools while other requests flood the cache: how much of their prompts is still
cached, with and without `retain_seconds`. The real scheduler and cache, without a model.

    python -m bench.retention [--blocks N] [--agents N] [--flood RATE] [--out FILE]

A step takes simulated time by its tokens, and the cache has the simulation's clock. An agent has a prompt
of its own, and between its turns it waits some seconds for a tool, whose result is appended. The flood is of
single requests under one of ten system prompts.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from bench.router import VOCABULARY, words, zipf

from quire.bench.record import run_record
from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.kvcache.retention import Retention
from quire.messages import AddRequest
from quire.placement import Placement, Retain
from quire.scheduler import Scheduler, SchedulerLimits

STEP_SECONDS, TOKEN_SECONDS = 0.004, 0.0001
BLOCK_SIZE, MAX_LENGTH = 16, 8192
TURNS, PROMPT, RESULT, OUTPUT = 10, 2000, 200, 60
PAUSE = (3.0, 10.0)
"""Seconds that a tool takes."""
FLOOD_PROMPT, FLOOD_SYSTEM = 400, 300


@dataclass(slots=True)
class Kind:
    """What has been measured of agents or of the flood."""

    hits: int = 0
    tokens: int = 0
    ttfts: list[float] = field(default_factory=list)

    def result(self) -> dict[str, float]:
        return {
            "hit_rate": self.hits / self.tokens,
            "ttft_median": statistics.median(self.ttfts),
            "ttft_p90": statistics.quantiles(self.ttfts, n=10)[-1],
        }


@dataclass(slots=True)
class Live:
    kind: str
    at: float
    tokens: list[int]
    turns_left: int = 0
    answer: list[int] = field(default_factory=list)


def run(
    seconds: float | None, share: float, *, blocks: int, agents: int, flood: float, length: float
) -> dict[str, dict[str, float]]:
    """seconds: that agents ask for; None: they do not. Returns what was measured of each kind; of agents
    without their first turns, which nobody can have cached."""
    dice = random.Random(0)
    now = 0.0
    kv = KVCacheManager(
        1 + blocks,
        BLOCK_SIZE,
        enable_prefix_caching=True,
        retention=Retention.of_blocks(blocks, share, 1, lambda: now),
    )
    limits = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=MAX_LENGTH)
    executor = MockExecutor(lambda request, index: (request * 31 + index * 7) % VOCABULARY)
    core = EngineCore(Scheduler(limits, kv, clock=lambda: now), executor, clock=lambda: now)
    numbers = itertools.count(1)
    arrivals: list[tuple[float, int, Live]] = []
    for _ in range(agents):
        at = dice.uniform(0, length / 4)
        arrivals.append((at, next(numbers), Live("agents", at, words(dice, PROMPT), TURNS)))
    systems = [words(dice, FLOOD_SYSTEM) for _ in range(10)]
    at = 0.0
    while at < length:
        at += dice.expovariate(flood)
        tokens = systems[zipf(dice, 10)] + words(dice, FLOOD_PROMPT)
        arrivals.append((at, next(numbers), Live("flood", at, tokens)))
    heapq.heapify(arrivals)
    live: dict[int, Live] = {}
    found = {"agents": Kind(), "flood": Kind()}
    while arrivals or live:
        if not core.has_work:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            _, number, one = heapq.heappop(arrivals)
            live[number] = one
            retain = (Retain(seconds),) if seconds and one.kind == "agents" else ()
            core.handle(
                AddRequest(
                    request_id=number,
                    prompt_token_ids=one.tokens,
                    decoding=Decoding(max_tokens=OUTPUT),
                    placement=Placement(tenant=one.kind, retain=retain),
                )
            )
        outputs = core.step()
        assert outputs.stats is not None
        now += STEP_SECONDS + TOKEN_SECONDS * outputs.stats.step_tokens
        for update in outputs.updates:
            one = live[update.request_id]
            if update.prefix is not None and one.turns_left != TURNS:
                kind = found[one.kind]
                kind.hits += update.prefix.cached
                kind.tokens += len(one.tokens)
                kind.ttfts.append(now - one.at)
            one.answer += update.new_token_ids
            if update.finish_reason is not None:
                del live[update.request_id]
                if one.turns_left > 1:
                    at = now + dice.uniform(*PAUSE)
                    tokens = one.tokens + one.answer + words(dice, RESULT)
                    again = Live("agents", at, tokens, one.turns_left - 1)
                    heapq.heappush(arrivals, (at, next(numbers), again))
    return {name: kind.result() for name, kind in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--agents", type=int, default=10)
    parser.add_argument("--flood", type=float, default=12.0, help="requests a second")
    parser.add_argument("--length", type=float, default=120.0, help="seconds of flood")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("blocks", "agents", "flood", "length")}
    results = {}
    for name, seconds, share in (
        ("without", None, 0.5),
        ("30 s, share 0.25", 30.0, 0.25),
        ("30 s, share 0.5", 30.0, 0.5),
        ("5 min, share 0.5", 300.0, 0.5),
        ("endless cache", None, 0.0),
    ):
        given = sizes | ({"blocks": 200_000} if name == "endless cache" else {})
        results[name] = run(seconds, share, **given)
        for kind, values in results[name].items():
            shown = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"{name:18} {kind:7} {shown}", flush=True)
    if args.out is not None:
        args.out.write_text(
            json.dumps({**run_record(), "sizes": sizes, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()

"""How many prompt tokens are found in the replicas' caches, by how requests are routed. Without a model.

    python -m bench.router [--replicas N] [--requests N] [--out FILE]      # simulated
    python -m bench.router --real                                         # and by `-dp` on the built-in model

Each replica is the real scheduler and cache, over an executor that samples scripted tokens; a step takes
simulated time by its tokens. `oracle` is the same rule with knowledge in place of the router's guess: it
looks into the replicas' caches, and at the prompts that are under way to them. `--real` sends the
requests one after another through `AsyncLLM`, and simulates the same.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quire.bench.record import run_record
from quire.config import from_flat
from quire.decoding import Decoding
from quire.engine.async_llm import AsyncLLM
from quire.engine.core import EngineCore
from quire.engine.router import Router
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.kvcache.block import CacheKey
from quire.messages import AddRequest
from quire.sampling_params import SamplingParams
from quire.scheduler import Scheduler, SchedulerLimits

STEP_SECONDS, TOKEN_SECONDS = 0.004, 0.0001
"""A step's time: fixed, and for each of its tokens."""
BLOCK_SIZE = 16
OUTPUT_TOKENS = 32
VOCABULARY = 4000
MAX_LENGTH = 2048


@dataclass(slots=True)
class Turn:
    """One request: a prompt, or the next turn of a conversation, which comes after the answer to the last."""

    tokens: list[int]
    """Of the prompt; for a later turn, what the user adds."""
    wait: float
    """Seconds after the one before it (in a conversation: after its answer)."""


Talk = list[Turn]
"""A conversation; a single request is one of a turn."""


def zipf(dice: random.Random, count: int) -> int:
    return dice.choices(range(count), [1 / (rank + 1) for rank in range(count)])[0]


def words(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(VOCABULARY) for _ in range(count)]


def chats(dice: random.Random, count: int) -> list[Talk]:
    """Conversations of 2 to 8 turns, under one of 5 system prompts."""
    systems = [words(dice, dice.randrange(50, 400)) for _ in range(5)]
    talks = []
    for _ in range(count // 5):
        turns = [
            Turn(words(dice, dice.randrange(20, 200)), dice.expovariate(1 / 2.0))
            for _ in range(dice.randrange(2, 9))
        ]
        turns[0].tokens[:0] = systems[zipf(dice, 5)]
        talks.append(turns)
    return talks


def shared(dice: random.Random, count: int) -> list[Talk]:
    """Single requests under one of 200 long prompts, by Zipf's law; together they are larger than a cache."""
    systems = [words(dice, dice.randrange(200, 1000)) for _ in range(200)]
    return [
        [Turn(systems[zipf(dice, 200)] + words(dice, dice.randrange(10, 60)), 0.0)]
        for _ in range(count)
    ]


def few_shot(dice: random.Random, count: int) -> list[Talk]:
    """60 tasks with 5 examples each, of which a request has the first few, and a question."""
    tasks = [[words(dice, 100) for _ in range(5)] for _ in range(60)]
    talks = []
    for _ in range(count):
        task = tasks[zipf(dice, 60)][: dice.randrange(1, 6)]
        talks.append([Turn([*itertools.chain(*task), *words(dice, 40)], 0.0)])
    return talks


def short(talk: Talk) -> Talk:
    """The turns that fit the built-in model's context."""
    sizes = itertools.accumulate(len(turn.tokens) + OUTPUT_TOKENS for turn in talk)
    return [turn for turn, size in zip(talk, sizes, strict=True) if size < MAX_LENGTH]


WORKLOADS = {"chats": chats, "shared": shared, "few-shot": few_shot}


@dataclass(slots=True)
class Replica:
    """A core without a model, and its clock."""

    core: EngineCore
    now: float = 0.0
    queries: int = 0
    hits: int = 0
    live: dict[int, list[int]] = field(default_factory=dict)
    """The prompts that it is to compute, or has."""

    def known(self, tokens: Sequence[int]) -> int:
        """Tokens of a prompt that its cache holds or will hold."""
        kv = self.core.scheduler.kv
        cached = kv.match_prefix(-1, tokens, CacheKey(), 0).num_tokens
        kv.forget(-1)
        return max([cached, *(common(tokens, other) for other in self.live.values())])


def common(tokens: Sequence[int], other: Sequence[int]) -> int:
    """In whole blocks."""
    pairs = zip(tokens, other, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(other)))
    return length // BLOCK_SIZE * BLOCK_SIZE


def new_replica(num_blocks: int) -> Replica:
    limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=MAX_LENGTH)
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
    executor = MockExecutor(lambda request, index: (request * 31 + index * 7) % VOCABULARY)
    return Replica(EngineCore(Scheduler(limits, kv), executor))


Choose = Callable[[int, Sequence[int]], int]


class Simulation:
    """Replicas, and the requests that come to them in simulated time."""

    def __init__(self, policy: str, count: int, num_blocks: int) -> None:
        self.replicas = [new_replica(num_blocks) for _ in range(count)]
        self.router: Router[int] = Router()
        for index in range(count):
            self.router.add(index, cache_tokens=(num_blocks - 1) * BLOCK_SIZE)
        if policy == "oracle":
            targets = self.router._targets
            self.router._chunks = lambda tokens, namespace: list(tokens)  # type: ignore[method-assign]
            for index, replica in enumerate(self.replicas):
                targets[index] = Exact(targets[index], replica)  # type: ignore[assignment]
            self.router._cuts = range(1 << 20)  # type: ignore[assignment]
        self.policy = policy
        self.dice = random.Random(7)
        self.turn = itertools.cycle(range(count))
        self.seconds: list[float] = []
        self.latencies: list[float] = []

    def choose(self, request: int, tokens: Sequence[int]) -> int:
        if self.policy in ("random", "round robin"):
            count = len(self.replicas)
            return self.dice.randrange(count) if self.policy == "random" else next(self.turn)
        started = time.perf_counter()
        chosen = self.router.choose(request, tokens)
        self.seconds.append(time.perf_counter() - started)
        return chosen

    def run(self, talks: list[Talk], rate: float | None) -> dict[str, float]:
        """rate: conversations that begin in a second, all replicas together. None: one after another."""
        dice = random.Random(1)
        arrivals: list[tuple[float, int, Talk, int, list[int]]] = []
        at, numbers = 0.0, itertools.count(1)
        for talk in talks:
            at += dice.expovariate(rate) if rate is not None else 1e4
            arrivals.append((at, next(numbers), talk, 0, []))
        heapq.heapify(arrivals)
        live: dict[int, tuple[float, Talk, int, list[int], list[int]]] = {}
        while arrivals or live:
            busy = [r for r in self.replicas if r.core.has_work]
            replica = min(busy, key=lambda each: each.now, default=None)
            if replica is None or (arrivals and arrivals[0][0] <= replica.now):
                at, number, talk, turn, history = heapq.heappop(arrivals)
                tokens = history + talk[turn].tokens
                target = self.replicas[self.choose(number, tokens)]
                if not target.core.has_work:
                    target.now = max(target.now, at)
                target.core.handle(
                    AddRequest(
                        request_id=number,
                        prompt_token_ids=tokens,
                        decoding=Decoding(max_tokens=OUTPUT_TOKENS),
                    )
                )
                target.live[number] = tokens
                live[number] = (at, talk, turn, tokens, [])
                continue
            outputs = replica.core.step()
            assert outputs.stats is not None
            replica.now += STEP_SECONDS + TOKEN_SECONDS * outputs.stats.step_tokens
            replica.queries += outputs.stats.prefix_queries
            replica.hits += outputs.stats.prefix_hits
            for update in outputs.updates:
                if update.prefix is not None:
                    self.router.computed(update.request_id)
                    self.latencies.append(replica.now - live[update.request_id][0])
                live[update.request_id][4].extend(update.new_token_ids)
                if update.finish_reason is not None:
                    self.router.end(update.request_id)
                    del replica.live[update.request_id]
                    at, talk, turn, tokens, answer = live.pop(update.request_id)
                    if turn + 1 < len(talk):
                        at = replica.now + talk[turn + 1].wait
                        again = (at, next(numbers), talk, turn + 1, tokens + answer)
                        heapq.heappush(arrivals, again)
        queries = sum(replica.queries for replica in self.replicas)
        result = {
            "hit_rate": sum(replica.hits for replica in self.replicas) / queries,
            "mean_ttft": statistics.mean(self.latencies),
            "seconds": max(replica.now for replica in self.replicas),
        }
        if self.seconds:
            result["choice_us"] = 1e6 * statistics.median(self.seconds)
        return result


class Exact:
    """A router's target that looks into the cache. Its "chunks" are the prompt's tokens, one by one."""

    def __init__(self, target: object, replica: Replica) -> None:
        self._target, self._replica = target, replica

    def num_known(self, tokens: Sequence[int]) -> int:
        return self._replica.known(tokens)

    def learn(self, tokens: Sequence[int]) -> None:
        pass

    @property
    def load(self) -> int:
        return self._target.load  # type: ignore[attr-defined]

    @load.setter
    def load(self, value: int) -> None:
        self._target.load = value  # type: ignore[attr-defined]


POLICIES = ("oracle", "router", "round robin", "random")


async def real(talks: list[Talk], replicas: int, num_blocks: int) -> dict[str, float]:
    """One after another, so that it does not depend on this machine's speed."""
    options = {
        "data_parallel_size": replicas, "num_gpu_blocks_override": num_blocks, "max_num_seqs": 16,
        "max_num_batched_tokens": 512, "max_model_len": MAX_LENGTH,
    }  # fmt: skip
    engine = await AsyncLLM.start(from_flat(options))
    hits = queries = 0

    def note(outputs: object) -> None:
        nonlocal hits, queries
        hits += outputs.stats.prefix_hits  # type: ignore[attr-defined]
        queries += outputs.stats.prefix_queries  # type: ignore[attr-defined]

    engine.add_stats_listener(note)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    try:
        for talk in talks:
            history: list[int] = []
            for turn in talk:
                history += turn.tokens
                async for output in engine.submit(list(history), params):
                    last = output
                history += last.outputs[0].token_ids
    finally:
        await engine.shutdown()
    return {"hit_rate": hits / queries}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--rate", type=float, default=20.0, help="conversations a second and replica"
    )
    parser.add_argument("--blocks", type=int, default=2000, help="of each replica")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, object] = {}
    for name, make in WORKLOADS.items():
        talks = [short(talk) for talk in make(random.Random(0), args.requests)]
        rate = None if args.real else args.rate * args.replicas / statistics.mean(map(len, talks))
        results = {}
        for policy in ("router",) if args.real else POLICIES:
            results[policy] = Simulation(policy, args.replicas, args.blocks).run(talks, rate)
        if args.real:
            results["real"] = asyncio.run(real(talks, args.replicas, args.blocks))
        record[name] = results
        best = results.get("oracle", results["router"])["hit_rate"]
        for policy, result in results.items():
            shown = "  ".join(f"{key} {value:.4g}" for key, value in result.items())
            print(f"{name:10} {policy:12} {result['hit_rate'] / best:6.3f}  {shown}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({**run_record(), "results": record}, indent=1))


if __name__ == "__main__":
    main()

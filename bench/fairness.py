"""Shares of tenants, waits of a polite one beside a flood, throughput, and what the fair policy costs.
Without a model.

    python -m bench.fairness [--out FILE]

The real scheduler and KV cache, and an executor that samples a fixed token at once. Service is counted as it
is charged: 1 for each prompt token computed, 2 for each generated one. Cost is the processor time of
`schedule`, `update` and `take_stats` of a step, without the slowest twentieth of the steps. Two runs, one of
each policy, take turns of a few steps, so that both have the same neighbours. The median difference of
several such pairs counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quire.bench.record import run_record
from quire.decoding import Decoding
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, SampledRow, StepPlan, StepResult
from quire.placement import Placement
from quire.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE = 16
POLICIES = ("fcfs", "fair")
TURN = 20
"""Steps."""


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    every: int | None = None
    """Steps between its requests; None: it always has some queued."""
    weight: float = 1.0
    prefix: int = 0
    """Tokens with which all its prompts begin."""


FLOOD = Tenant("flood", (1000, 2000), (64, 256))
CHAT = Tenant("chat", (50, 200), (32, 128))


@dataclass
class Run:
    """A few steps of one policy."""

    policy: str
    tenants: tuple[Tenant, ...]
    num_blocks: int = 4000
    seats: int = 64
    seed: int = 1
    queued: int = 8
    """Of a tenant that floods, at least."""
    step: int = 0
    service: dict[str, float] = field(default_factory=dict)
    waits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Steps from arrival to first token, and those that its own prompt takes with a whole budget."""
    seconds: list[float] = field(default_factory=list)
    gap: float = 0.0
    tokens: int = 0
    computed: int = 0
    """With those that were computed again."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        limits = SchedulerLimits(
            self.seats, 2048, 4096, watermark_blocks=self.num_blocks // 100, policy=self.policy
        )
        self.scheduler = Scheduler(
            limits, KVCacheManager(self.num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
        )
        self._next_id = 0
        self._arrived: dict[int, tuple[Tenant, int, int]] = {}
        self._queued = {tenant.name: 0 for tenant in self.tenants}
        self.service = {tenant.name: 0.0 for tenant in self.tenants}
        self.waits = {tenant.name: [] for tenant in self.tenants}
        self._reached: dict[int, int] = {}
        self._leads: dict[tuple[str, str], tuple[float, float]] = {}

    def run(self, steps: int) -> Run:
        floods = [tenant for tenant in self.tenants if tenant.every is None]
        for _ in range(steps):
            for tenant in self.tenants:
                if tenant.every is None:
                    while self._queued[tenant.name] < self.queued:
                        self._add(tenant)
                elif self.step % tenant.every == 0:
                    self._add(tenant)
            self._take_step()
            self._compare(floods)
        return self

    def empty(self, count: int) -> None:
        """Queue so many requests of each tenant, and carry them out."""
        for _ in range(count):
            for tenant in self.tenants:
                self._add(tenant)
        while self.scheduler.has_work:
            self._take_step()

    def _add(self, tenant: Tenant) -> None:
        self._next_id += 1
        rng, length = self._rng, self._rng.randint(*tenant.prompts)
        prompt = (
            [7] * tenant.prefix
            + [self._next_id]
            + [rng.randrange(50_000) for _ in range(length - 1)]
        )
        message = AddRequest(
            request_id=self._next_id,
            prompt_token_ids=prompt,
            decoding=Decoding(max_tokens=rng.randint(*tenant.outputs)),
            placement=Placement(tenant=tenant.name, weight=tenant.weight),
            arrival_time=float(self.step),
        )
        self._arrived[self._next_id] = (tenant, self.step, len(prompt))
        self._queued[tenant.name] += 1
        self.scheduler.add_request(message)

    def _take_step(self) -> None:
        self.step += 1
        begin = time.thread_time()
        plan = self.scheduler.schedule()
        planned = time.thread_time()
        result = _carried_out(plan)
        done = time.thread_time()
        updates = self.scheduler.update(plan, result)
        self.scheduler.take_stats()
        self.seconds.append(time.thread_time() - done + planned - begin)
        for admitted in plan.admitted:
            if admitted.request_id not in self._reached:
                self._queued[self._arrived[admitted.request_id][0].name] -= 1
        self.computed += plan.num_tokens
        for row in plan.rows:
            tenant, _, length = self._arrived[row.request_id]
            before = self._reached.get(row.request_id, row.start)
            reach = max(before, min(length, row.start + row.num_tokens))
            self._reached[row.request_id] = reach
            self.service[tenant.name] += reach - before
            self.tokens += reach - before
        for update in updates:
            tenant, arrived, length = self._arrived[update.request_id]
            if update.times is not None:
                own = -(-length // 2048)
                self.waits[tenant.name].append((self.step - arrived, own))
            self.service[tenant.name] += 2 * len(update.new_token_ids)
            self.tokens += len(update.new_token_ids)

    def _compare(self, floods: list[Tenant]) -> None:
        for one in floods:
            for other in floods:
                if one.name < other.name:
                    lead = (
                        self.service[one.name] / one.weight
                        - self.service[other.name] / other.weight
                    )
                    low, high = self._leads.get((one.name, other.name), (lead, lead))
                    low, high = min(low, lead), max(high, lead)
                    self._leads[one.name, other.name] = (low, high)
                    self.gap = max(self.gap, high - low)


def _carried_out(plan: StepPlan) -> StepResult:
    sampled = [
        SampledRow(request_id=row.request_id, token_ids=[7]) for row in plan.rows if row.samples
    ]
    return StepResult(step_id=plan.step_id, sampled=sampled)


def jain(shares: list[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def shares(label: str, tenants: tuple[Tenant, ...], steps: int, **options: int) -> Iterator[dict]:
    for policy in POLICIES:
        run = Run(policy, tenants, **options).run(steps)
        normal = [run.service[tenant.name] / tenant.weight for tenant in tenants]
        yield {
            "case": label,
            "policy": policy,
            "shares": {
                name: round(part / sum(run.service.values()), 4)
                for name, part in run.service.items()
            },
            "jain": round(jain(normal), 4),
            "off_weights": round(max(normal) / statistics.fmean(normal) - 1, 4),
            "gap": round(run.gap),
            "bound": 2 * 2 * BLOCK_SIZE * run.num_blocks,
            "tokens_per_step": round(run.tokens / run.step, 1),
        }


def polite(steps: int) -> Iterator[dict]:
    """One request per 20 steps, beside 200 that are queued."""
    tenants = (
        Tenant("flood", (100, 1000), (16, 64)),
        Tenant("polite", (50, 200), (16, 32), every=20),
    )
    for policy in POLICIES:
        run = Run(policy, tenants, num_blocks=6000, queued=200).run(steps)
        waits = sorted(wait for wait, own in run.waits["polite"]) or [steps]
        beyond = sorted(wait - own for wait, own in run.waits["polite"]) or [steps]
        yield {
            "case": "polite",
            "policy": policy,
            "answered": len(run.waits["polite"]),
            "ttft_steps": {"p50": waits[len(waits) // 2], "p99": waits[len(waits) * 99 // 100]},
            "beyond_own_prefill_p99": beyond[len(beyond) * 99 // 100],
        }


def throughput(count: int) -> Iterator[dict]:
    """So many requests of each of four tenants, all at once, until the last has ended, in a pool that
    preempts now and then. The work is the same. A step takes 10 ms, and 20 us for each token."""
    tenants = tuple(
        Tenant(f"t{i}", (100 * (i + 1), 400 * (i + 1)), (32, 128), prefix=64 * (i % 2))
        for i in range(4)
    )
    found = {}
    for policy in POLICIES:
        seconds = tokens = 0.0
        for seed in (1, 2, 3):
            run = Run(policy, tenants, num_blocks=2500, seed=seed)
            run.empty(count)
            seconds += run.step * 0.010 + run.computed * 20e-6
            tokens += run.tokens
        found[policy] = round(tokens / seconds, 1)
    yield {"case": "throughput", **found, "ratio": round(found["fair"] / found["fcfs"], 4)}


def cost(label: str, steps: int, repeats: int, **options: int) -> Iterator[dict]:
    """64 tenants with requests queued: microseconds of a step."""
    tenants = tuple(Tenant(f"t{i}", (50, 200), (64, 256)) for i in range(64))

    def microseconds(seed: int) -> dict[str, float]:
        runs = [
            Run(policy, tenants, queued=2, seed=seed, **options).run(100) for policy in POLICIES
        ]
        for run in runs:
            run.seconds.clear()
        gc.collect()
        gc.disable()
        for turn in range(steps // TURN):
            for run in runs if turn % 2 else reversed(runs):
                run.run(TURN)
        gc.enable()
        return {
            run.policy: 1e6 * statistics.fmean(sorted(run.seconds)[: len(run.seconds) * 95 // 100])
            for run in runs
        }

    found = [microseconds(seed) for seed in range(repeats)]
    more = [each["fair"] - each["fcfs"] for each in found]
    us = {
        policy: round(statistics.median(each[policy] for each in found), 1) for policy in POLICIES
    }
    yield {
        "case": label,
        "us": us,
        "more": round(statistics.median(more), 1),
        "more_of_each": [round(each, 1) for each in sorted(more)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases that begin so")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    steps, few = args.steps, args.steps // 6
    three = (
        Tenant("a", (50, 1000), (32, 128)),
        Tenant("b", (50, 300), (32, 256)),
        Tenant("c", (500, 1500), (16, 64)),
    )
    weighted = tuple(Tenant(f"w{w}", (50, 400), (32, 128), weight=w) for w in (1.0, 2.0, 4.0))
    prefixes = (
        Tenant("shared", (50, 300), (32, 128), prefix=256),
        Tenant("fresh", (50, 556), (32, 128)),
    )
    cases: list[tuple[str, Callable[[], Iterator[dict]]]] = [
        ("shares", lambda: shares("flood and chat", (FLOOD, CHAT), steps)),
        ("shares", lambda: shares("three, 600 blocks", three, steps, num_blocks=600)),
        ("shares", lambda: shares("weights 1 2 4", weighted, steps)),
        ("shares", lambda: shares("shared prefixes of 256", prefixes, steps)),
        ("polite", lambda: polite(steps)),
        ("throughput", lambda: throughput(steps // 20)),
        ("cost", lambda: cost("64 tenants, 64 seats", few, args.repeats, num_blocks=6000)),
        ("cost", lambda: cost("128 seats", few, args.repeats, num_blocks=6000, seats=128)),
        ("cost", lambda: cost("blocks lack", few, args.repeats, num_blocks=800, seats=128)),
    ]  # fmt: skip
    results = []
    for name, case in cases:
        for result in case() if name.startswith(args.only) else ():
            print(json.dumps(result), flush=True)
            results.append(result)
    if args.out is not None:
        args.out.write_text(
            json.dumps({"record": run_record(), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

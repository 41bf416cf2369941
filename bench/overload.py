"""Throughput when more requests arrive than can be served, and the KV cache is small. Without a model.

    python -m bench.overload [--seconds N] [--out FILE]

The real scheduler, with steps that take simulated time by their tokens. Outputs end where nobody can know it
before, so requests are preempted. Capacity is the largest throughput at any rate of arrival, and overload is
twice the rate at which it is reached. `plain` admits whoever fits, as Quire did before it compared costs
(`scheduler/worth.py`). With a tier, blocks that leave the cache are saved, and loaded one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.bench.record import run_record
from quire.decoding import Decoding
from quire.kvcache import KVCacheManager
from quire.messages import (
    AddRequest,
    BlockName,
    KVSource,
    SampledRow,
    StepPlan,
    StepResult,
    Transfer,
    TransferResult,
)
from quire.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE = 16
MAX_LENGTH = 4096
RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of arrival, relative to what the machine could serve with an endless cache."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step costs, in seconds."""

    fixed: float
    row: float
    prompt_token: float
    context_token: float
    load_block: float
    """From a tier; one load after the other."""

    def seconds(self, plan: StepPlan) -> float:
        prompts = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        context = sum(row.start for row in plan.rows)
        rows = sum(1 for row in plan.rows if row.num_tokens == 1)
        return (
            self.fixed
            + self.row * rows
            + self.prompt_token * prompts
            + self.context_token * context
        )


MACHINES = {
    "cpu": Machine(0.030, 0.0015, 0.00056, 2e-8, 0.00006),
    "gpu": Machine(0.012, 0.00005, 0.00004, 2e-9, 0.0001),
}
"""About M2 on two cores, and an 8B model on a large GPU."""


@dataclass(frozen=True, slots=True)
class Workload:
    prompt: int
    output: int
    """Means; both vary by a factor of about two."""
    num_seqs: int
    pool: float
    """The KV cache, in sequences of mean length."""


WORKLOADS = {
    "chat": Workload(500, 300, 64, 16.0),
    "long answers": Workload(100, 800, 64, 16.0),
    "long prompts": Workload(1500, 150, 32, 8.0),
}


class Tier:
    """A connector to a store that is as large as it has to be."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.names: set[BlockName] = set()
        self.free_at = 0.0
        self.under_way: list[tuple[float, Transfer]] = []

    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        return next((i for i, name in enumerate(names) if name not in self.names), len(names))

    def seconds(self, num_blocks: int, source: KVSource | None = None) -> float:
        return num_blocks * self.machine.load_block

    def wants_evicted(self, name: BlockName) -> bool:
        return name not in self.names

    def wants_reused(self, name: BlockName, hits: int) -> bool:
        return False

    def hold(self, names: Sequence[BlockName], num_tokens: int) -> KVSource | None:
        return None

    def take(self, plan: StepPlan, now: float) -> None:
        for save in plan.saves:
            self.names.update(save.names)
        for load in plan.loads:
            self.free_at = max(now, self.free_at) + self.seconds(len(load.names))
            self.under_way.append((self.free_at, load))

    def done(self, now: float) -> list[TransferResult]:
        done = [load for at, load in self.under_way if at <= now]
        self.under_way = [one for one in self.under_way if one[0] > now]
        return [
            TransferResult(transfer_id=load.transfer_id, num_good=len(load.names)) for load in done
        ]


@dataclass(slots=True)
class Outcome:
    seconds: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    """Computed, again or not."""
    preemptions: int = 0
    finished: int = 0

    @property
    def throughput(self) -> float:
        return self.output_tokens / self.seconds


class Simulation:
    def __init__(
        self, machine: Machine, workload: Workload, *, tier: bool = False, plain: bool = False,
        endless: bool = False,
    ) -> None:  # fmt: skip
        self.machine, self.now = machine, 0.0
        self.workload = workload
        mean = (workload.prompt + workload.output) / BLOCK_SIZE
        pool = workload.num_seqs * 4 if endless else workload.pool
        num_blocks = 1 + max(int(pool * mean), MAX_LENGTH // BLOCK_SIZE)
        limits = SchedulerLimits(
            max_num_seqs=workload.num_seqs,
            max_num_batched_tokens=1024,
            max_model_len=MAX_LENGTH,
            watermark_blocks=num_blocks // 100,
        )
        kv = KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
        self.tier = Tier(machine) if tier else None
        self.scheduler = Scheduler(limits, kv, clock=lambda: self.now, connector=self.tier)
        if plain:
            self.scheduler.worth.least_steps = math.inf
        self.lengths: dict[int, int] = {}

    def run(self, rate: float, seconds: float, *, seed: int = 0) -> Outcome:
        """rate: requests per second. Measured after a quarter of the time."""
        dice = random.Random(seed)
        arrivals: deque[tuple[float, AddRequest]] = deque()
        at = 0.0
        while at < seconds:
            at += dice.expovariate(rate)
            arrivals.append((at, self._request(dice, len(arrivals), at)))
        outcome = Outcome()
        while self.now < seconds:
            while arrivals and arrivals[0][0] <= self.now:
                self.scheduler.add_request(arrivals.popleft()[1])
            plan = self.scheduler.schedule()
            self._step(plan, outcome, self.now >= seconds / 4)
            if not plan.rows and not self.scheduler.has_work and arrivals:
                self.now = max(self.now, arrivals[0][0])
        outcome.seconds = self.now - seconds / 4
        return outcome

    def _request(self, dice: random.Random, number: int, at: float) -> AddRequest:
        workload = self.workload
        prompt = max(8, min(3000, int(dice.lognormvariate(-0.2, 0.63) * workload.prompt)))
        output = max(1, min(1000, int(dice.lognormvariate(-0.2, 0.63) * workload.output)))
        self.lengths[number] = output
        return AddRequest(
            request_id=number,
            prompt_token_ids=[dice.randrange(32000) for _ in range(prompt)],
            decoding=Decoding(max_tokens=1000, end_token_ids=frozenset({-1})),
            arrival_time=at,
        )

    def _step(self, plan: StepPlan, outcome: Outcome, counts: bool) -> None:
        self.now += self.machine.seconds(plan) if plan.rows else 0.002
        transferred = []
        if self.tier is not None:
            self.tier.take(plan, self.now)
            transferred = self.tier.done(self.now)
        sampled = []
        for row in plan.rows:
            if row.samples:
                request = self.scheduler.requests[row.request_id]
                last = request.num_output_tokens + 1 >= self.lengths[row.request_id]
                sampled.append(SampledRow(request_id=row.request_id, token_ids=[-1 if last else 5]))
            if counts and row.num_tokens > 1:
                outcome.prompt_tokens += row.num_tokens
        result = StepResult(step_id=plan.step_id, sampled=sampled, transferred=transferred)
        for update in self.scheduler.update(plan, result):
            if counts:
                outcome.output_tokens += len(update.new_token_ids)
                if update.finish_reason is not None:
                    outcome.finished += 1
                    outcome.preemptions += update.num_preemptions


def measure(
    machine: Machine, workload: Workload, seconds: float, served: float, *, tier: bool, plain: bool
) -> dict[str, float]:
    def run(rate: float) -> Outcome:
        return Simulation(machine, workload, tier=tier, plain=plain).run(rate * served, seconds)

    found = {rate: run(rate) for rate in RATES}
    best = max(RATES, key=lambda rate: found[rate].throughput)
    overload = run(2 * best)
    return {
        "capacity": round(found[best].throughput, 1),
        "at": best,
        "overload": round(overload.throughput, 1),
        "ratio": round(overload.throughput / found[best].throughput, 3),
        "preemptions_per_request": round(overload.preemptions / max(1, overload.finished), 2),
        "prompt_tokens_per_second": round(overload.prompt_tokens / overload.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'machine':<8}{'workload':<14}{'tier':<6}{'plain':<7}capacity overload ratio preempted")
    for machine_name, machine in MACHINES.items():
        for name, workload in WORKLOADS.items():
            seconds = options.seconds * machine.fixed / MACHINES["cpu"].fixed
            endless = Simulation(machine, workload, endless=True).run(1000 / seconds, seconds)
            served = endless.finished / endless.seconds
            for tier, plain in itertools.product((False, True), (True, False)):
                figures = measure(machine, workload, seconds, served, tier=tier, plain=plain)
                row = {"machine": machine_name, "workload": name, "tier": tier, "plain": plain}
                rows.append(row | figures)
                print(
                    f"{machine_name:<8}{name:<14}{tier!s:<6}{plain!s:<7}{figures['capacity']:8.1f} "
                    f"{figures['overload']:8.1f} {figures['ratio']:5.3f} "
                    f"{figures['preemptions_per_request']:9.2f}",
                    flush=True,
                )
    if options.out is not None:
        options.out.write_text(json.dumps(run_record() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""W6 through the real scheduler with assumed costs of a step: what a token budget changes.

    python -m bench.agents_schedule [--budgets 2048 512] [--seeds 3] [--token-us 570 --key-us 0.25 ...]

No model runs. A step takes as long as its rows cost: a fixed part (the weights are read once), a part for
each prompt token (products), for each pair of a prompt token and a key before it (attention), and for each
decoding row and its keys. The defaults are near what was measured for M2 on two cores of an Intel Xeon
without AMX (docs/performance.md). Means over the seeds are printed, times in seconds.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from bench.peers import agents
from bench.peers.client import percentile

from quire.bench.agents import AgentShape, Session, interactivity, schedule
from quire.decoding import Decoding
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, PlannedRow, SampledRow, StepResult
from quire.placement import Placement
from quire.scheduler import Scheduler, SchedulerLimits

VOCAB_SIZE = 32000
BLOCK_SIZE = 16
ANSWER = VOCAB_SIZE
"""Every token that is sampled: one that no prompt has, as random ids stand for the answers in the history."""


@dataclass(frozen=True, slots=True)
class Costs:
    """In microseconds."""

    step: float = 8000.0
    token: float = 570.0
    """Of a prompt token: its products."""
    key: float = 0.25
    """Of a prompt token and one key before it."""
    row: float = 300.0
    """Of a decoding row, its keys apart."""
    decode_key: float = 0.5

    def seconds(self, rows: Sequence[PlannedRow]) -> float:
        return 1e-6 * (self.step + sum(map(self._row, rows)))

    def _row(self, row: PlannedRow) -> float:
        if row.num_tokens == 1:
            return self.row + self.decode_key * row.start
        return row.num_tokens * (self.token + self.key * (row.start + row.num_tokens / 2))


@dataclass(slots=True)
class TurnRun:
    session: Session
    turn: int
    due: float
    times: list[float] = field(default_factory=list)
    """When each token came."""


def simulate(shape: AgentShape, scheduler: Scheduler, costs: Costs, seed: int) -> list[TurnRun]:
    """All turns, in the order in which they ended. The scheduler must be new."""
    waiting: list[tuple[float, int, Session, int]] = []
    order = count(1)
    for session in schedule(shape, seed):
        heapq.heappush(waiting, (session.start, next(order), session, 0))
    live: dict[int, TurnRun] = {}
    done: list[TurnRun] = []
    now = 0.0
    while waiting or live:
        if not live:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            due, request_id, session, turn = heapq.heappop(waiting)
            live[request_id] = TurnRun(session, turn, due)
            scheduler.add_request(_request(request_id, live[request_id], seed))
        plan = scheduler.schedule()
        now += costs.seconds(plan.rows)
        sampled = [
            SampledRow(request_id=row.request_id, token_ids=[ANSWER])
            for row in plan.rows
            if row.samples
        ]
        for update in scheduler.update(plan, StepResult(step_id=plan.step_id, sampled=sampled)):
            run = live[update.request_id]
            run.times += [now] * len(update.new_token_ids)
            if update.finish_reason is None:
                continue
            done.append(live.pop(update.request_id))
            if run.turn + 1 < len(run.session.turns):
                due = now + shape.think_time
                heapq.heappush(waiting, (due, next(order), run.session, run.turn + 1))
    return done


def _request(request_id: int, run: TurnRun, seed: int) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=agents.prompt_ids(run.session, run.turn, VOCAB_SIZE, seed),
        decoding=Decoding(max_tokens=run.session.turns[run.turn].output_len),
        placement=Placement(),
        arrival_time=run.due,
    )


def new_scheduler(budget: int) -> Scheduler:
    blocks = agents.FULL.sessions * agents.LONGEST // BLOCK_SIZE
    limits = SchedulerLimits(
        max_num_seqs=64, max_num_batched_tokens=budget, max_model_len=agents.LONGEST
    )
    return Scheduler(limits, KVCacheManager(blocks, BLOCK_SIZE, enable_prefix_caching=True))


def figures(turns: Sequence[TurnRun]) -> dict[str, float]:
    ttft = [turn.times[0] - turn.due for turn in turns]
    gaps = [b - a for t in turns for a, b in zip(t.times, t.times[1:], strict=False)]
    return {
        "tok_s": interactivity([(turn.times[-1] - turn.due, len(turn.times)) for turn in turns]),
        "ttft_p50": percentile(ttft, 50),
        "ttft_p99": percentile(ttft, 99),
        "itl_p99": percentile(gaps, 99),
        "seconds": max(turn.times[-1] for turn in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", nargs="+", type=int, default=[8192, 2048, 1024, 512, 256, 128])
    parser.add_argument("--seeds", type=int, default=3)
    for name in Costs.__dataclass_fields__:
        flag = f"--{name.replace('_', '-')}-us"
        parser.add_argument(flag, type=float, default=getattr(Costs(), name), dest=name)
    args = parser.parse_args()
    costs = Costs(**{name: getattr(args, name) for name in Costs.__dataclass_fields__})
    for budget in args.budgets:
        runs = [
            figures(simulate(agents.FULL, new_scheduler(budget), costs, seed))
            for seed in range(args.seeds)
        ]
        means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        print(f"{budget:6}", "  ".join(f"{name} {value:7.2f}" for name, value in means.items()))


if __name__ == "__main__":
    main()

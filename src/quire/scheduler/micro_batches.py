"""How a step is divided among requests, and the work of a pipeline among its plans.

Each stage of a pipeline computes another plan, and a request waits for its token until the last stage has
sampled it. So stages are idle if all requests share a plan, and if consecutive plans differ in work. One rule
avoids both: a plan takes at most an equal share of all work there is, the work of the plans in flight
included. Work is rows that compute a single token, and tokens of prompts, whose chunks follow each other
without waiting. Since the plans in flight are counted, requests that begin or end change all shares alike,
and the division stays even.

That is not slower than one plan for all. If a stage takes t(n) for n rows, a token takes d * t(n) in one plan
and d * t(n / d) in d plans, and t does not fall. The tokens of prompts are divided among twice as many plans
as stages, since the largest chunk fills and empties the pipeline; but into no more parts than of a least
size, below which a chunk takes nearly as long as a larger one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice

from quire.messages import StepPlan
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.request import Request


class MicroBatches:
    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._in_flight: dict[int, int] = {}
        """Tokens of prompts in each plan in flight, by its step."""

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def share(
        self, running: list[Request], wanted: list[int], waiting: Iterable[Request]
    ) -> tuple[int, set[int]]:
        """The budget of the next plan, and the requests that have to wait for a later one. Reduces `wanted`
        to what the plan may take.

        wanted: tokens that each of the running requests would compute with the whole budget.
        """
        limits, stages = self._limits, self._limits.stages
        budget = limits.max_num_batched_tokens
        if stages == 1:
            return budget, set()
        ready = [index for index, count in enumerate(wanted) if count == 1]
        most_rows = _part(len(ready) + sum(map(_returns, running)), stages)
        left_out = ready[most_rows:]
        for index in left_out:
            wanted[index] = 0
        left = sum(self._in_flight.values()) + self._tokens_left(running, wanted, waiting)
        least = limits.least_prompt_tokens
        share = _part(left, max(1, min(2 * stages, left // least)))
        prompts = sum(count > 1 for count in wanted)
        most_tokens = max(min(share, max(_part(budget, stages), least)), prompts + 1)
        if limits.enable_chunked_prefill:
            budget = min(budget, len(ready) - len(left_out) + most_tokens)
        return budget, {running[index].request_id for index in left_out}

    def _tokens_left(
        self, running: list[Request], wanted: list[int], waiting: Iterable[Request]
    ) -> int:
        """Tokens of prompts that are not planned. Of waiting requests those that have a seat, without regard
        to what the cache may hold."""
        left = sum(
            request.num_tokens - request.num_computed_tokens
            for request, count in zip(running, wanted, strict=True)
            if count > 1
        )
        seats = self._limits.max_num_seqs - len(running)
        return left + sum(request.num_tokens for request in islice(waiting, seats))

    def launched(self, plan: StepPlan) -> None:
        tokens = 0
        if self._limits.stages > 1:  # else nothing is shared out
            counts = (row.num_tokens - len(row.draft_token_ids) for row in plan.rows)
            tokens = sum(count for count in counts if count > 1)
        self._in_flight[plan.step_id] = tokens

    def done(self, plan: StepPlan) -> None:
        del self._in_flight[plan.step_id]


def least_share(wanted: list[int], budget: int, block_size: int) -> int:
    """The quantum: the number of tokens that a running request, or the head of the queue, gets at least if it
    wants them.

    A quarter of the budget that single tokens leave is divided into equal parts: one for each request
    that wants more than one token. The first of those needs no part, as it gets the other three
    quarters; its part goes to the queue. What a request does not want is divided among the others.
    """
    counts = sorted(wanted)
    first = bisect_right(counts, 1)
    prompts = counts[first:]
    share = (budget - sum(counts[:first])) // 4
    sharers = len(prompts)
    for count in prompts:
        if count * sharers >= share:
            break
        share -= count
        sharers -= 1
    quantum = share // max(1, sharers)
    whole_blocks = quantum - quantum % block_size
    return whole_blocks or max(1, quantum)


def _returns(request: Request) -> bool:
    """Whether a request computes a single token after the plans in flight."""
    return request.num_pending_tokens > 0 and not request.ends_with_pending


def _part(count: int, parts: int) -> int:
    return -(-count // parts)

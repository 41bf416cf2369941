"""How much of the prompts a step computes while requests generate: what fits into its target.

With a target, prompts get the time that a step has left, by the cost model: the target divided by one and the
usual error of predictions, less what the rows of generating requests take. Time is divided, not tokens, since
a token far into its prompt attends to all before it and costs several times one at the beginning.

* The queue gets what running prompts do not want, and at least a quarter divided by their number.
* Of the rest, the first of the order gets at least a quarter, so that no prompt waits for ever.
* What is left goes to who needs the fewest tokens first. The share of prompts may be small, and in the order
  of the policy a short prompt would wait until a long one is computed.

Nobody gets less than a block of tokens: a quarter for which that is too long is saved up. Some prompt gets a
block in every step, whatever the target. Without a target, or if no request generates, nothing is limited.
What a request generates does not depend on how its prompt was divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from quire.messages import StepPlan
from quire.scheduler.cost_model import CostModel, Work, work_of
from quire.scheduler.decisions import Reporter
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.request import Request

PART = 1 / 4
"""Of the time for prompts, what the queue and the first of the order get at least."""
MOST_MARGIN = 0.25
UNKNOWN_TOKENS = 64
"""That fill a step, as long as no step with a prompt has been measured."""
FIRST_STEPS, MEASURED = 256, 4
"""After so many steps without prompts, one in so many is measured."""


@dataclass(slots=True)
class _Room:
    """The time for prompts in one step, and what their tokens cost."""

    limit: float
    """Of the step: the target without the margin."""
    seconds: float
    """Of it, what is left for prompts."""
    token: float
    context: float
    """For each token to which a token attends."""
    block: int
    whole: float = 0.0
    """What there was at first: at least a block at the beginning of a prompt."""
    queue: float = 0.0
    """Of that, what the queue may use."""
    admitted: int = 0
    """Tokens."""

    def cost(self, start: int, count: int) -> float:
        return count * (self.token + self.context * (start + count / 2))

    def tokens(self, seconds: float, start: int, most: int) -> int:
        """How many of a prompt from `start` fit, a block at least, but no more than `most`."""
        price = self.token + self.context * start
        seconds = max(0.0, seconds)
        root = price + math.sqrt(price * price + 2 * self.context * seconds)
        count = int(2 * seconds / root) if root else most
        if count > 4 * self.block:
            count -= count % self.block
        return min(most, max(self.block, count))


class LatencyTarget:
    def __init__(self, limits: SchedulerLimits, block_size: int, report: Reporter) -> None:
        self.cost = CostModel()
        self.target = limits.itl_target / limits.stages
        """Seconds; 0.0 for none. In a pipeline, a request has a token every so many steps."""
        self.predicted = 0.0
        """Of the last step that was measured, what was expected of it."""
        self.mean_context = 0.0
        """Of the last prompts, to how many tokens one attended."""
        self._limits, self._block, self._report = limits, block_size, report
        self._room: _Room | None = None
        self._num_drafts = 0
        """Of the last measured step."""
        self._num_steps = 0
        """Without prompts."""
        self._queue_saved = self._first_saved = 0.0
        """Seconds for the queue and for the first of the order, of steps that had no use for them."""

    # --- measuring --------------------------------------------------------------------------------

    def measure(self, plan: StepPlan, seconds: float) -> None:
        """A step is over."""
        if plan.num_tokens == len(plan.rows):
            self._num_steps += 1
            is_measured = self._num_steps <= FIRST_STEPS or self._num_steps % MEASURED == 0
            if not is_measured or not plan.rows:
                return
        work = work_of(plan.rows)
        if self._limits.max_drafts:
            self._num_drafts = sum(len(row.draft_token_ids) for row in plan.rows)
        self.predicted = self.cost.seconds(work)
        self.cost.observe(work, seconds)
        if work.prompt_tokens:
            self.mean_context += (work.prompt_contexts / work.prompt_tokens - self.mean_context) / 8

    def prompt_rate(self, running: Iterable[Request]) -> float:
        """Tokens of prompts per second beside what generates now. 0.0 if nothing is known."""
        if not self.cost.knows_prompts:
            return 0.0
        decoding = decoding_of(running)
        count = self._limits.max_num_batched_tokens - int(decoding.rows)
        context = int(self.mean_context)
        if self.target and decoding.rows:
            room = self._room_beside(decoding)
            count = room.tokens(room.seconds, context, count)
        count = max(1, count)
        step = decoding._replace(prompt_tokens=count, prompt_contexts=count * context)
        seconds = self.cost.seconds(step)
        return count / seconds if seconds else 0.0

    def _room_beside(self, decoding: Work) -> _Room:
        margin = min(MOST_MARGIN, 1.25 * self.cost.spread)  # about a standard deviation
        limit = self.target / (1 + margin)
        seconds = limit - self.cost.seconds(decoding)
        token, context = self.cost.coefficients[3:]
        if not self.cost.knows_prompts:
            token = max(seconds, 1e-9) / UNKNOWN_TOKENS
        return _Room(limit, seconds, token, context, self._block)

    # --- a step -----------------------------------------------------------------------------------

    def begin(self, running: list[Request], wanted: list[int]) -> None:
        """A step is to be planned. wanted: tokens of each running request, if nothing limits them."""
        self._room = None
        if not self.target or not any(map(_generates, running)):
            return
        counts = list(zip(running, wanted, strict=True))
        decoding = decoding_of(request for request, count in counts if count == 1)
        decoding = decoding._replace(rows=decoding.rows + self._num_drafts)
        room = self._room = self._room_beside(decoding)
        costs = [
            room.cost(request.num_computed_tokens, count) for request, count in counts if count > 1
        ]
        whole = room.whole = max(room.seconds, room.cost(0, self._block))
        self._queue_saved = min(self._queue_saved + PART * whole / max(1, len(costs)), whole)
        self._first_saved = min(self._first_saved + PART * whole, whole)
        room.queue = max(room.seconds - sum(costs), self._queue_saved)

    @property
    def is_used_up(self) -> bool:
        """Whether the queue has used its time."""
        return self._room is not None and self._room.queue <= 0.0

    def admit(self, num_found: int, count: int) -> int:
        """How many of `count` tokens a request computes that would be admitted now, with so many found in the
        cache. 0: it has to wait."""
        room = self._room
        if room is None or count <= 1:
            return count
        least = room.cost(num_found, min(count, self._block))
        if least > room.queue and self._queue_saved < room.whole:
            return 0
        count = room.tokens(room.queue, num_found, count)
        seconds = room.cost(num_found, count)
        self._queue_saved = max(0.0, self._queue_saved - seconds)
        room.queue -= seconds
        room.seconds -= seconds
        room.admitted += count
        return count

    def divide(self, running: list[Request], wanted: list[int]) -> set[int]:
        """Reduce `wanted` of prompts to what they get. Returns the requests that get nothing."""
        room = self._room
        if room is None:
            return set()
        prompts = [index for index, count in enumerate(wanted) if count > 1]
        given = dict.fromkeys(prompts, 0)

        def give(index: int, seconds: float) -> float:
            start = running[index].num_computed_tokens + given[index]
            most = wanted[index] - given[index]
            if room.cost(start, min(most, self._block)) > seconds:
                return 0.0
            count = room.tokens(seconds, start, most)
            given[index] += count
            cost = room.cost(start, count)
            room.seconds -= cost
            return cost

        if prompts:
            first = prompts[0]
            self._first_saved -= give(first, min(self._first_saved, room.seconds))
            prompts.sort(key=lambda i: running[i].num_tokens - running[i].num_computed_tokens)
            for index in prompts:
                give(index, room.seconds)
            if not room.admitted and not any(given.values()):
                index = first if self._first_saved >= room.whole else prompts[0]
                given[index] = min(wanted[index], self._block)
                cost = room.cost(running[index].num_computed_tokens, given[index])
                room.seconds -= cost
                if index == first:
                    self._first_saved = max(0.0, self._first_saved - cost)
        self._decide(room, wanted, given)
        for index, count in given.items():
            wanted[index] = count
        return {running[index].request_id for index, count in given.items() if not count}

    def _decide(self, room: _Room, wanted: list[int], given: dict[int, int]) -> None:
        if given or room.admitted:
            needed = room.admitted + sum(wanted[index] for index in given)
            budget = room.admitted + sum(given.values())
            self._report.latency(needed, budget, self.target, room.limit - room.seconds)


def decoding_of(requests: Iterable[Request]) -> Work:
    """What those that generate compute in a step, without drafts."""
    rows = contexts = 0
    for request in requests:
        if _generates(request):
            rows += 1
            contexts += request.num_computed_tokens
    return Work(rows, contexts)


def _generates(request: Request) -> bool:
    """Whether it computes one token after the other."""
    return (
        request.generates
        and request.num_output_tokens + request.num_pending_tokens > 0
        and request.num_tokens - request.num_computed_tokens <= 1
    )

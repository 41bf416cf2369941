"""Requests driven through a worker by scripted plans, with guesses at what comes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.decoding import Decoding
from quire.messages import AdmittedRequest, PlannedRow, StepPlan, TokenLogprobs
from quire.runner.worker import Worker

BLOCKS_EACH = 2
GREEDY = Decoding(max_tokens=9, logprobs=2)
DRAWN = Decoding(max_tokens=9, temperature=0.9, top_p=0.9, top_k=30, seed=11, min_tokens=3,
                 stop_token_ids=frozenset({3, 4}), logit_bias={7: 1.0})  # fmt: skip
REQUESTS = {1: (list(range(20, 31)), GREEDY), 2: (list(range(40, 47)), DRAWN)}
COUNT = 9

Drafter = Callable[[int, int], Sequence[int]]
"""(request, how many tokens it has generated) -> drafts."""


@dataclass
class Generated:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    steps: int = 0


def generate(worker: Worker, drafter: Drafter = lambda request, count: ()) -> dict[int, Generated]:
    """All requests in each step, until each has COUNT tokens. The first prompt comes in two pieces."""
    found = {request: Generated() for request in REQUESTS}
    admitted = [
        AdmittedRequest(
            request_id=request, token_ids=prompt, num_prompt_tokens=len(prompt), decoding=decoding,
            block_ids=([1 + BLOCKS_EACH * (request - 1) + i for i in range(BLOCKS_EACH)],),
        )
        for request, (prompt, decoding) in REQUESTS.items()
    ]  # fmt: skip
    first, second = (len(prompt) for prompt, _ in REQUESTS.values())
    rows = [row(1, 0, first - 4, samples=0), row(2, 0, second)]
    plan = StepPlan(step_id=0, admitted=admitted, rows=rows)
    starts = {1: first - 4}
    while rows:
        for sampled in worker.execute(plan).result().sampled:
            assert sampled.error is None
            mine = found[sampled.request_id]
            mine.tokens += sampled.token_ids
            mine.logprobs += sampled.logprobs or []
            mine.steps += 1
        rows = []
        for request, (prompt, _) in REQUESTS.items():
            have = found[request].tokens
            if len(have) >= COUNT:
                continue
            known = len(prompt) + len(have)
            start = starts.pop(request, known - 1)
            drafts = drafter(request, len(have))[: COUNT - len(have) - 1] if have else ()
            rows.append(row(request, start, known - start, drafts))
        plan = StepPlan(step_id=plan.step_id + 1, rows=rows)
    worker.execute(StepPlan(step_id=plan.step_id, released=list(REQUESTS))).result()
    return found


def row(
    request: int, start: int, count: int, drafts: Sequence[int] = (), *, samples: int = 1
) -> PlannedRow:
    return PlannedRow(
        request_id=request, start=start, num_tokens=count + len(drafts),
        samples=samples + len(drafts), draft_token_ids=tuple(drafts),
    )  # fmt: skip


def nearly_right(truth: dict[int, Generated]) -> Drafter:
    """Of 0 to 3 drafts the last is wrong every other time."""

    def drafts(request: int, count: int) -> list[int]:
        size = (count + request) % 4
        guess = truth[request].tokens[count : count + size]
        if guess and count % 2:
            guess[-1] = (guess[-1] + 1) % 50
        return guess

    return drafts

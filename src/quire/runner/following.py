"""A rank that does not sample: it carries out the plans of the sampling rank, and learns the tokens later.

Every rank has the same seats and computes the same rows, so that all take part in each gather. The tokens
that the sampling rank has made of a plan arrive before the first plan whose rows compute them. Grammars,
penalties and drafters exist on the sampling rank alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
from torch import Tensor

from quire.decoding import Decoding
from quire.messages import AdmittedRequest, PlannedRow, StepPlan, TokenLogprobs, TransferResult
from quire.messages.worker import RunStep, SampledTokens
from quire.runner.runner import Runner, RunningStep
from quire.runner.seats import Seats
from quire.sampling.sampler import Sampled

RequestTables = tuple[int, list[int], list[list[int]]]
"""Request id, its tokens, its block table in each group of layers."""


class Follower:
    """Over the runner of such a rank."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._running: dict[int, RunningStep] = {}
        """By step id, until its tokens are known."""

    def run(self, step: RunStep) -> Sequence[TransferResult]:
        """Returns loads that are over."""
        for sampled in step.sampled:
            self._learn(sampled)
        plan = step.plan
        if not self._runner.model.spec.is_last:  # the last stage alone has hidden states
            for request in plan.admitted:
                request.decoding = Decoding()
        running = self._runner.launch(plan)
        if isinstance(running, RunningStep):
            self._running[plan.step_id] = running
            return running.result().transferred  # the logits of prompts are gathered too
        return ()

    def _learn(self, sampled: SampledTokens) -> None:
        """Write the tokens where the sampling rank has them."""
        running = self._running.pop(sampled.step_id, None)
        if running is None:  # a plan without rows
            return
        seats, tokens = self._runner.seats, sampled.token_ids
        plain = running.extras is None and running.num_released == seats.num_released
        if plain and all(len(each) == 1 for each in tokens):
            seats.token_ids[running.seats, running.positions] = [token for (token,) in tokens]
            seats.num_brought[running.seats] = running.positions + 1
            return
        for row, ids in zip(running.rows, tokens, strict=True):
            if ids and (seat := seats.seat_of.get(row.request_id)) is not None:
                seats.bring(seat, first_sample(row), ids)


class NoSampler:
    """In place of a `Sampler`: the tokens that it returns mean nothing."""

    def sample(self, logits: Tensor, *table: object) -> Sampled:
        count, none = len(logits), dict[int, TokenLogprobs]()
        return Sampled(np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.bool_), none)


def first_sample(row: PlannedRow) -> int:
    """The index in its request of the first token that the row samples."""
    return row.start + row.num_tokens - len(row.draft_token_ids)


def without_sampling(plan: StepPlan) -> StepPlan:
    """The plan for a rank that does not sample."""
    if not plan.admitted:
        return plan
    admitted = [_without_sampling(request) for request in plan.admitted]
    return msgspec.structs.replace(plan, admitted=admitted)


def _without_sampling(request: AdmittedRequest) -> AdmittedRequest:
    of = request.decoding
    return msgspec.structs.replace(
        request,
        decoding=Decoding(
            task=of.task,
            prompt_logprobs=of.prompt_logprobs,
            logprob_token_ids=of.logprob_token_ids,
            first_prompt_logprob=of.first_prompt_logprob,
            pooling=of.pooling,
        ),
    )


def tables_of(seats: Seats, known: Mapping[int, int]) -> Iterator[RequestTables]:
    """known: by request, how many of its tokens are compared."""
    for request_id, count in sorted(known.items()):
        seat = seats.seat_of[request_id]
        blocks = [table[seat, : seats.num_blocks[seat]].tolist() for table in seats.block_ids]
        yield request_id, seats.token_ids[seat, :count].tolist(), blocks


def digest_of(tables: Iterable[RequestTables]) -> bytes:
    """A hash of tokens and block tables, to compare those of ranks with the scheduler's."""
    return hashlib.blake2b(msgspec.msgpack.encode(list(tables)), digest_size=16).digest()

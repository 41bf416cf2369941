"""Drafts at the runner: the samples of rows that verify some, and the drafts for the next plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from quire.messages import PlannedRow, SampledRow
from quire.runner.seats import Seats
from quire.sampling.sampler import NO_DRAFT
from quire.speculative.base import Drafter, DraftTask

Asked = list[tuple[SampledRow, DraftTask]]


def samples_of(rows: Sequence[PlannedRow]) -> tuple[list[int], list[int]]:
    """Of the samples of rows with and without drafts, in order: the index in its request of the token to be
    sampled, and the draft before it (`StepInput.drafts`)."""
    positions: list[int] = []
    drafts: list[int] = []
    for row in rows:
        end = row.start + row.num_tokens
        positions += range(end - row.samples + 1, end + 1)
        drafts.append(NO_DRAFT)
        drafts += row.draft_token_ids
    return positions, drafts


def ask_for(
    rows: Sequence[PlannedRow],
    results: Sequence[SampledRow],
    sample_seats: NDArray[np.int64],
    positions: NDArray[np.int64],
    seats: Seats,
) -> Asked:
    """The results that want drafts, and for how many tokens. rows, results: that sample; the results may have
    more at the end. sample_seats, positions: [R], of all samples of the rows, in their order."""
    asked, begin = [], 0
    for row, result in zip(rows, results, strict=False):
        if row.num_drafts and result.error is None:
            seat = int(sample_seats[begin])
            end = int(positions[begin]) + len(result.token_ids)
            most = min(row.num_drafts, seats.max_model_len - end)
            if most > 0 and seats.seat_of.get(row.request_id) == seat:
                asked.append((result, DraftTask(seat, end, most)))
        begin += row.samples
    return asked


def propose(drafter: Drafter, asked: Asked, seats: Seats, vocab_size: int) -> None:
    """Give each result its drafts: those that its rules leave no choice about, else the drafter's, as far as
    they are tokens of the model that its rules allow."""
    left = []
    for result, task in asked:
        if (rules := seats.rules.get(task.seat)) is not None:
            result.draft_token_ids = tuple(rules.certain(task.most))
        if not result.draft_token_ids:
            left.append((result, task))
    if not left:
        return
    proposed = drafter.propose([task for _, task in left])
    for (result, task), drafts in zip(left, proposed, strict=True):
        usable = takewhile(lambda draft: 0 <= draft < vocab_size, drafts[: task.most])
        result.draft_token_ids = tuple(map(int, usable))
        if (rules := seats.rules.get(task.seat)) is not None:
            allowed = rules.num_allowed(result.draft_token_ids)
            result.draft_token_ids = result.draft_token_ids[:allowed]

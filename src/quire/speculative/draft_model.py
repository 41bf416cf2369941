"""A small model of the same vocabulary drafts; the target verifies its tokens in one step.

Its drafts are drawn with the request's own parameters and random stream: the noise of a position is the
same for both models, so they agree far more often than two independent draws would ("drafter-invariant"
coupling, arXiv 2408.07978). With `draft_sample_method` "greedy" they are its likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quire.errors import ConfigError
from quire.kernels.base import Kernels
from quire.kernels.program import ForwardPass, StepRows
from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.speculative.base import DraftContext, DraftTask
from quire.speculative.draft_cache import DraftCache
from quire.speculative.spec import DraftSpec
from quire.weights.source import open_source

MOST_CATCH_UP = 2048
"""Tokens that a call computes besides one for each task. Requests that lack more get no drafts in that
step."""


class DraftModel:
    def __init__(
        self,
        model: DecoderModel,
        kernels: Kernels,
        *,
        most: int,
        vocab_size: int,
        greedy: bool = False,
    ) -> None:
        """most: drafts of a step. vocab_size: of the target. greedy: drafts are the likeliest tokens."""
        self._model, self._kernels = model, kernels
        self._most, self._greedy = most, greedy
        self._vocab_size = vocab_size

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        seats = len(rows.token_ids)
        self._cache = DraftCache(
            rows,
            num_blocks,
            block_size,
            num_layers=self._model.spec.num_layers,
            heads=self._model.spec.heads,
            most_drafts=self._most,
            dtype=self._model.dtype,
            kernels=self._kernels,
        )
        self._rows = StepRows(
            rows.token_ids, rows.block_ids[:1], np.zeros((seats, 4), dtype=np.int64)
        )
        self._loop = drafting_loop(
            self._model.over(self._cache.kv), self._kernels, self._rows, self._most
        )
        self._samples = np.zeros(seats, dtype=SAMPLE_ROW)
        self._num_random = 0
        self._room = min(rows.token_ids.shape[1] - 1, self._model.max_model_len)

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        self._cache.begin(plan, seat_of)
        for request in plan.admitted:
            seat = seat_of[request.request_id]
            self._samples[seat] = sample_row(request.decoding)
            self._num_random += not request.decoding.is_greedy

    def release(self, seat: int) -> None:
        self._cache.release(seat)
        self._num_random -= bool(self._samples[seat]["temperature"] > 0)
        self._samples[seat] = 0

    def _can_read(self, seat: int, first: int, end: int) -> bool:
        """Whether the tokens are in the draft model's vocabulary, which may lack the target's last ids."""
        size = self._model.spec.vocab_size
        if size >= self._vocab_size:
            return True
        return bool((self._rows.token_ids[seat, first:end] < size).all())

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        """A task whose context the draft model has not computed yet catches up first, as far as a call
        may."""
        drafts: list[Sequence[int]] = [()] * len(tasks)
        table, wanted, numbers, ends = [], [], [], []
        left, taken = MOST_CATCH_UP, set()
        for number, task in enumerate(tasks):
            seat, n = task.seat, task.num_tokens
            most = min(task.most, self._room - n)
            if most <= 0:
                continue
            first = self._cache.first_missing(seat, n)
            if n - first > 1:
                block = self._cache.block_of(seat, first)
                if block in taken or not left:
                    continue  # another row computes it now, or there is no budget left
                taken.add(block)
            count = min(n - first, left + 1)
            left -= count - 1
            if not self._can_read(seat, first, first + count):
                continue
            if count < n - first or not self._cache.lend(seat, n + most - 1):
                most = 0
            table.append((seat, first, count, int(most > 0)))
            wanted.append(most)
            numbers.append(number)
            ends.append(first + count)
        if not table:
            return drafts
        rows = self._rows
        rows.rows[: len(table)] = table
        rows.num_rows, rows.num_wanted = len(table), sum(most > 0 for most in wanted)
        samples = None
        if self._num_random and not self._greedy:
            samples = self._samples.take([row[0] for row in table])
            samples["position"] = ends
        for number, end, made in zip(numbers, ends, self._loop.run(wanted, samples), strict=True):
            self._cache.computed(tasks[number].seat, end, made[:-1])
            drafts[number] = made
        return drafts


class PlainDrafting:
    """Pass by pass."""

    def __init__(self, forward: ForwardPass, kernels: Kernels, rows: StepRows, most: int) -> None:
        self._forward, self._kernels, self._rows = forward, kernels, rows

    def run(self, wanted: list[int], samples: NDArray[np.void] | None) -> list[list[int]]:
        rows = self._rows
        first = rows.rows[: len(wanted)].copy()
        made: list[list[int]] = [[] for _ in wanted]
        alive = [i for i, most in enumerate(wanted) if most]
        while True:
            logits = self._forward.forward(rows)
            if not alive:
                return made
            sampling = None
            if samples is not None:
                sampling = samples[alive].copy()
                sampling["position"] += [len(made[i]) for i in alive]
            found = self._kernels.sample(logits, sampling)
            for i, token, valid in zip(alive, found.token_ids.tolist(), found.valid, strict=True):
                seat, place = first[i, 0], first[i, 1] + first[i, 2] + len(made[i])
                if valid and place < rows.token_ids.shape[1]:
                    rows.token_ids[seat, place] = token
                    made[i].append(token)
            turn = len(max(made, key=len))
            alive = [i for i in alive if len(made[i]) == turn < wanted[i]]
            if not alive:
                return made
            rows.rows[: len(alive)] = [
                (first[i, 0], first[i, 1] + first[i, 2] + turn - 1, 1, 1) for i in alive
            ]
            rows.num_rows = rows.num_wanted = len(alive)


class DraftingLoop(Protocol):
    def run(self, wanted: list[int], samples: NDArray[np.void] | None) -> list[list[int]]:
        """wanted: how many drafts, by row of the first pass; 0 only computes the row. samples: of the first
        drafts, as for `Kernels.sample`. Returns the drafts by row."""
        ...


def drafting_loop(
    forward: ForwardPass, kernels: Kernels, rows: StepRows, most: int
) -> DraftingLoop:
    """The loop in C where the pass is a recorded program."""
    from quire.kernels.cpu.program import NativeProgram

    if isinstance(forward, NativeProgram):
        from quire.kernels.cpu.draft import NativeDrafting

        return NativeDrafting(forward, rows, most)
    return PlainDrafting(forward, kernels, rows, most)


def create(context: DraftContext) -> DraftModel:
    """Raises as loading any model does."""
    draft, kernels = context.draft, context.target.kernels
    assert isinstance(draft, DraftSpec), "the configuration was resolved without a draft"
    if kernels.name not in ("native", "reference"):
        raise ConfigError("method draft_model drafts on the CPU only so far; use ngram or suffix.")
    model = load_model(
        draft.model,
        open_source(draft.directory),
        dtype=getattr(torch, draft.dtype),
        kernels=kernels,
        load_format=context.load_format,  # type: ignore[arg-type]
        max_model_len=draft.max_model_len,
        seed=context.seed,
    )
    return DraftModel(
        model,
        kernels,  # type: ignore[arg-type]
        most=context.options.num_speculative_tokens,
        vocab_size=context.target.spec.vocab_size,
        greedy=context.options.draft_sample_method == "greedy",
    )

"""Carries out plans: from a `StepPlan` to arrays for a backend, and from its samples to a `StepResult`.

A row may end in drafts (`PlannedRow.draft_token_ids`). Then a token is sampled after each draft, with the
request's own random stream. The result is these tokens up to the first one that differs from the next
draft: the same tokens as without drafts, in fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import KVCache
from quire.messages import PlannedRow, SampledRow, StepPlan, StepResult
from quire.models.decoder import DecoderModel
from quire.runner.backend import LaunchedSamples, StepBackend, StepInput, StepSamples
from quire.runner.prompt_work import PromptWork
from quire.runner.seats import Seats, independent
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import GrammarSource
from quire.structured.base import GrammarError
from quire.structured.masks import Mask

NOTHING_ALLOWED = "no token satisfies its constraints, or it is too complex to follow; simplify it."
NAN_ERROR = "The model produced invalid numbers (NaN) for this request."


class Runner:
    """A model, its KV cache and the requests admitted to it, on one device."""

    def __init__(
        self,
        model: DecoderModel,
        backend: StepBackend,
        *,
        max_num_seqs: int,
        grammars: GrammarSource | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self._max_num_seqs = max_num_seqs
        self._grammars = grammars

    def open_cache(self, kv_cache: KVCache, max_model_len: int) -> None:
        """Called before the first plan, and again if the size changes."""
        self.kv_cache = kv_cache
        self.seats = Seats(
            max_num_seqs=self._max_num_seqs,
            max_model_len=max_model_len,
            block_size=kv_cache.block_size,
            num_groups=len(self.model.spec.kv.groups),
            vocab_size=self.model.spec.vocab_size,
            grammars=self._grammars,
        )
        self.backend.open_cache(kv_cache, self.seats)

    def launch(self, plan: StepPlan) -> RunningStep | FinishedStep:
        """Apply the plan: release, admit, copy, compute, sample."""
        assert not plan.loads and not plan.saves, "no worker moves KV in or out yet"
        with self.backend.active():
            for request_id in plan.released:
                self.backend.release(self.seats.release(request_id))
            for request in plan.admitted:
                self.backend.admit(self.seats.admit(request), request)
            for copies in independent(plan.copies):
                self.backend.copy(copies)
            if not plan.rows:
                return FinishedStep(plan.step_id)
            return self._launch(plan)

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        with self.backend.active():
            return self.backend.prepare()

    def _launch(self, plan: StepPlan) -> RunningStep:
        seats, table, has_drafts = self.seats, [], False
        for row in plan.rows:
            seat = seats.seat_of[row.request_id]
            if row.new_block_ids:
                seats.add_blocks(seat, row.new_block_ids)
            if drafts := row.draft_token_ids:
                assert seat not in seats.rules, "rules follow tokens that are known"
                seats.bring(seat, row.start + row.num_tokens - len(drafts), drafts)
                has_drafts = True
            table.append((seat, row.start, row.num_tokens, row.samples))
        columns = seats.step.rows[: len(table)]
        columns[:] = table
        rows: Sequence[PlannedRow] = plan.rows
        sample_rows = columns[:, 3].nonzero()[0]
        sample_seats, positions = columns[:, 0].copy(), columns[:, 1] + columns[:, 2]
        if has_drafts or len(sample_rows) < len(rows):
            rows = [row for row in rows if row.samples]
            sample_rows = np.repeat(np.arange(len(table)), columns[:, 3])
            sample_seats, positions = sample_seats[sample_rows], positions[sample_rows]
        if has_drafts:  # `positions` has those of each row's last sample
            last = np.cumsum(columns[:, 3])[sample_rows] - 1
            positions -= last - np.arange(len(last))
        rules: dict[int, RequestRules] = {}
        if seats.rules:
            numbered = enumerate(sample_seats.tolist())
            rules = {i: seats.rules[seat] for i, seat in numbered if seat in seats.rules}
        reads = self._prompt_rows(plan.rows, columns) if seats.prompts else {}
        seats.step.num_rows = len(table)
        seats.step.num_wanted = int(columns[:, 3].sum()) if reads else len(sample_rows)
        errors: dict[int, str] = {}
        arrays = StepInput(
            rows=seats.step,
            sample_rows=sample_rows,
            sample_seats=sample_seats,
            positions=positions,
            read_rows=list(reads),
            masks=partial(_masks, rules, errors) if rules else dict,
        )
        return RunningStep(
            step_id=plan.step_id,
            runner=self,
            launched=self.backend.launch(arrays),
            rows=rows,
            seats=sample_seats,
            positions=positions,
            tenure=seats.tenure[sample_seats],
            num_released=seats.num_released,
            rules=rules,
            reads=list(reads.values()),
            has_drafts=has_drafts,
            errors=errors,
        )

    def _prompt_rows(
        self, rows: Sequence[PlannedRow], columns: NDArray[np.int64]
    ) -> dict[int, tuple[PlannedRow, PromptWork]]:
        """Index -> number of wanted hidden states, for the rows whose hidden states are read."""
        found = {}
        for index, row in enumerate(rows):
            seat = self.seats.seat_of[row.request_id]
            work = self.seats.prompts.get(seat)
            if work is None:
                continue
            if wanted := work.wanted(row.start, row.num_tokens):
                columns[index, 3] = max(row.samples, wanted)
                found[index] = (row, work)
            if work.is_done(row.start + row.num_tokens):
                del self.seats.prompts[seat]
        return found


def _masks(rules: Mapping[int, RequestRules], errors: dict[int, str]) -> dict[int, Mask]:
    """Masks of the samples that have rules; an error if no token is allowed."""
    found = {}
    for index, of in rules.items():
        try:
            mask = of.mask()
            if mask is not None and not mask.any():
                raise GrammarError(NOTHING_ALLOWED)
        except GrammarError as error:
            errors[index] = str(error)
            continue
        if mask is not None:
            found[index] = mask
    return found


@dataclass(slots=True)
class RunningStep:
    """A `StepFuture`: the host's data of a step with R samples, until these have come."""

    step_id: int
    runner: Runner
    launched: LaunchedSamples
    rows: Sequence[PlannedRow]
    """The rows that sample."""
    seats: NDArray[np.int64]
    """[R], like the next two: for each sample."""
    positions: NDArray[np.int64]
    tenure: NDArray[np.int64]
    num_released: int
    """The number of released requests when the step was launched."""
    rules: Mapping[int, RequestRules]
    """By index in the R."""
    reads: Sequence[tuple[PlannedRow, PromptWork]]
    has_drafts: bool
    errors: dict[int, str]
    """By index in the R: the error, if there is no token."""

    def result(self) -> StepResult:
        """Wait for the samples, and store the tokens in the seats."""
        with self.runner.backend.active():
            samples, seats = self.launched.wait(), self.runner.seats
            if seats.num_released == self.num_released:
                seats.token_ids[self.seats, self.positions] = samples.token_ids
            else:  # some seats may belong to other requests now
                kept = np.flatnonzero(seats.tenure[self.seats] == self.tenure)
                seats.token_ids[self.seats[kept], self.positions[kept]] = samples.token_ids[kept]
            if not samples.valid.all():
                for index in np.flatnonzero(~samples.valid).tolist():
                    self.errors.setdefault(index, NAN_ERROR)
            found = self._verified(samples) if self.has_drafts else self._sampled(samples)
            for index, rules in self.rules.items():
                if index not in self.errors and self._is_present(index):
                    found[index].token_ids += self._learn(index, rules, samples)
            if self.reads:
                self._read_prompts(samples.hidden, found)
            return StepResult(step_id=self.step_id, sampled=found)

    def _is_present(self, index: int) -> bool:
        """Whether the sample's seat still belongs to its request."""
        return bool(self.runner.seats.tenure[self.seats[index]] == self.tenure[index])

    def _sampled(self, samples: StepSamples) -> list[SampledRow]:
        """Results of rows that sample one token."""
        found = [
            SampledRow(request_id=row.request_id, token_ids=[token])
            for row, token in zip(self.rows, samples.token_ids.tolist(), strict=True)
        ]
        for index, entry in samples.logprobs.items():
            found[index].logprobs = [entry]
        for index, error in self.errors.items():
            found[index].token_ids, found[index].logprobs = [], None
            found[index].error = error
        return found

    def _verified(self, samples: StepSamples) -> list[SampledRow]:
        """Results of rows with drafts: the accepted drafts and the token after them."""
        token_ids, found, begin = samples.token_ids.tolist(), [], 0
        for row in self.rows:
            accepted = 0
            for draft in row.draft_token_ids:
                if draft != token_ids[begin + accepted]:
                    break
                accepted += 1
            indices = range(begin, begin + accepted + 1)
            result = SampledRow(
                request_id=row.request_id, token_ids=[token_ids[i] for i in indices]
            )
            if error := next((self.errors[i] for i in indices if i in self.errors), None):
                result.token_ids, result.error = [], error
            elif begin in samples.logprobs:
                result.logprobs = [samples.logprobs[i] for i in indices]
            if row.draft_token_ids and self._is_present(begin):
                end = self.positions[begin] + accepted + 1
                self.runner.seats.num_brought[self.seats[begin]] = end
            found.append(result)
            begin += row.samples
        return found

    def _learn(self, index: int, rules: RequestRules, samples: StepSamples) -> list[int]:
        """Apply a token that was sampled with rules. Returns the grammar-forced tokens after it."""
        seats, token = self.runner.seats, int(samples.token_ids[index])
        seat, position = int(self.seats[index]), int(self.positions[index])
        rules.learn(token)
        forced = rules.forced(seats.max_model_len - 1 - position)
        seats.bring(seat, position, [token, *forced])
        if forced:
            self.runner.backend.force(seat, forced)
        return forced

    def _read_prompts(self, hidden: Sequence[Tensor], found: list[SampledRow]) -> None:
        """Add the results of prompt work."""
        of_request = {row.request_id: row for row in found}
        for (row, work), states in zip(self.reads, hidden, strict=True):
            read = work.read(row.start, row.num_tokens, states, self.runner.model)
            if read is None:
                continue
            result = of_request.get(row.request_id)
            if result is None:
                result = SampledRow(request_id=row.request_id, token_ids=[])
                found.append(result)
            result.prompt_logprobs, result.embedding = read.logprobs, read.embedding


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A `StepFuture` of a plan without rows."""

    step_id: int

    def result(self) -> StepResult:
        return StepResult(step_id=self.step_id)

"""Carries out plans: from a `StepPlan` to arrays for a backend, and from what it sampled to a `StepResult`.

A row may end in drafts (`PlannedRow.draft_token_ids`). A token is then sampled after each of them, from the
request's own random stream as ever, and those tokens are the result up to the first that is not the next
draft: what would have been sampled without drafts, in fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import KVCache
from quire.messages import PlannedRow, SampledRow, StepPlan, StepResult, TokenLogprobs
from quire.models.decoder import DecoderModel
from quire.runner.backend import LaunchedSamples, StepBackend, StepInput
from quire.runner.prompt_work import PromptWork
from quire.runner.seats import Seats, independent
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import GrammarSource
from quire.structured.base import GrammarError
from quire.structured.masks import Mask

NOTHING_ALLOWED = "no token satisfies its constraints, or it is too complex to follow; simplify it."
NAN_ERROR = "The model produced invalid numbers (NaN) for this request."


@dataclass(slots=True)
class _Step:
    """What the host must know of a step when its R samples are there."""

    rows: Sequence[PlannedRow]
    """Those that sample."""
    seats: NDArray[np.int64]
    """[R], as the next two: of each sample."""
    positions: NDArray[np.int64]
    tenure: NDArray[np.int64]
    rules: Mapping[int, RequestRules]
    """By index in the R."""
    reads: Sequence[tuple[PlannedRow, PromptWork]]
    has_drafts: bool
    errors: dict[int, str] = field(default_factory=dict)
    """By index in the R: why nothing may be sampled."""

    def masks(self) -> dict[int, Mask]:
        found = {}
        for index, rules in self.rules.items():
            try:
                mask = rules.mask()
                if mask is not None and not mask.any():
                    raise GrammarError(NOTHING_ALLOWED)
            except GrammarError as error:
                self.errors[index] = str(error)
                continue
            if mask is not None:
                found[index] = mask
        return found


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
        """Before any plan. Again, if another size is settled on."""
        self.kv_cache = kv_cache
        self.seats = Seats(
            max_num_seqs=self._max_num_seqs,
            max_model_len=max_model_len,
            block_size=kv_cache.block_size,
            vocab_size=self.model.spec.vocab_size,
            grammars=self._grammars,
        )
        self.backend.open_cache(kv_cache, self.seats)

    def launch(self, plan: StepPlan) -> RunningStep:
        """Apply the plan: release, admit, copy, compute, sample."""
        with self.backend.active():
            for request_id in plan.released:
                self.backend.release(self.seats.release(request_id))
            for request in plan.admitted:
                self.backend.admit(self.seats.admit(request), request)
            for copies in independent(plan.copies):
                self.backend.copy(copies)
            if not plan.rows:
                return RunningStep(plan.step_id, self)
            step, arrays = self._make_step(plan.rows)
            return RunningStep(plan.step_id, self, step, self.backend.launch(arrays))

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        with self.backend.active():
            return self.backend.prepare()

    # --- to the device --------------------------------------------------------------------------------

    def _make_step(self, rows: Sequence[PlannedRow]) -> tuple[_Step, StepInput]:
        seats, table, has_drafts = self.seats, [], False
        for row in rows:
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
        sample_rows = columns[:, 3].nonzero()[0]
        sampling = rows if len(sample_rows) == len(rows) else [row for row in rows if row.samples]
        if has_drafts:
            sample_rows = np.repeat(np.arange(len(table)), columns[:, 3])
        sample_seats = columns[sample_rows, 0]
        positions = columns[sample_rows, 1] + columns[sample_rows, 2]
        if has_drafts:
            last = np.cumsum(columns[:, 3])[sample_rows] - 1  # of the row's samples, at `positions`
            positions -= last - np.arange(len(last))
        rules: dict[int, RequestRules] = {}
        if seats.rules:
            numbered = enumerate(sample_seats.tolist())
            rules = {i: seats.rules[seat] for i, seat in numbered if seat in seats.rules}
        reads = self._prompt_rows(rows, columns) if seats.prompts else {}
        seats.step.num_rows = len(table)
        seats.step.num_wanted = int(columns[:, 3].sum()) if reads else len(sample_rows)
        step = _Step(
            rows=sampling,
            seats=sample_seats,
            positions=positions,
            tenure=seats.tenure[sample_seats],
            rules=rules,
            reads=list(reads.values()),
            has_drafts=has_drafts,
        )
        return step, StepInput(
            rows=seats.step,
            sample_rows=sample_rows,
            sample_seats=sample_seats,
            positions=positions,
            read_rows=list(reads),
            masks=step.masks,
        )

    def _prompt_rows(
        self, rows: Sequence[PlannedRow], columns: NDArray[np.int64]
    ) -> dict[int, tuple[PlannedRow, PromptWork]]:
        """Those whose hidden states are read, by index; so many are wanted of them."""
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

    # --- and back -------------------------------------------------------------------------------------

    def finish(self, step_id: int, step: _Step, launched: LaunchedSamples) -> StepResult:
        """Wait for a step's samples, and let its requests' seats know them."""
        samples = launched.wait()
        seats, token_ids = self.seats, samples.token_ids
        alive = seats.tenure[step.seats] == step.tenure
        if alive.all():
            seats.token_ids[step.seats, step.positions] = token_ids
        else:  # some have been given up meanwhile
            seats.token_ids[step.seats[alive], step.positions[alive]] = token_ids[alive]
        errors = step.errors
        if not samples.valid.all():
            for index in np.flatnonzero(~samples.valid).tolist():
                errors.setdefault(index, NAN_ERROR)
        if step.has_drafts:
            found = self._verify(step, token_ids, alive, samples.logprobs)
        else:
            found = [
                SampledRow(request_id=row.request_id, token_ids=[token])
                for row, token in zip(step.rows, token_ids.tolist(), strict=True)
            ]
            for index, entry in samples.logprobs.items():
                found[index].logprobs = [entry]
            for index, error in errors.items():
                found[index].token_ids, found[index].logprobs = [], None
                found[index].error = error
        for index, rules in step.rules.items():
            if index not in errors and alive[index]:
                found[index].token_ids += self._learn(step, index, rules, int(token_ids[index]))
        if step.reads:
            self._read_prompts(step, samples.hidden, found)
        return StepResult(step_id=step_id, sampled=found)

    def _verify(
        self,
        step: _Step,
        token_ids: NDArray[np.int64],
        alive: NDArray[np.bool_],
        logprobs: Mapping[int, TokenLogprobs],
    ) -> list[SampledRow]:
        """Of each row the drafts that were sampled too, one after the other, and the token after them."""
        sampled, found, begin = token_ids.tolist(), [], 0
        for row in step.rows:
            count = 1
            for draft, token in zip(row.draft_token_ids, sampled[begin:], strict=False):
                if draft != token:
                    break
                count += 1
            indices = range(begin, begin + count)
            result = SampledRow(request_id=row.request_id, token_ids=sampled[begin : begin + count])
            if error := next((step.errors[i] for i in indices if i in step.errors), None):
                result.token_ids, result.error = [], error
            elif begin in logprobs:
                result.logprobs = [logprobs[i] for i in indices]
            if row.draft_token_ids and alive[begin]:
                self.seats.num_brought[step.seats[begin]] = step.positions[begin] + count
            found.append(result)
            begin += row.samples
        return found

    def _learn(self, step: _Step, index: int, rules: RequestRules, token: int) -> list[int]:
        """A token was sampled under rules. Returns those that can only follow it."""
        seat, position = int(step.seats[index]), int(step.positions[index])
        rules.learn(token)
        forced = rules.forced(self.seats.max_model_len - 1 - position)
        self.seats.bring(seat, position, [token, *forced])
        if forced:
            self.backend.force(seat, forced)
        return forced

    def _read_prompts(
        self, step: _Step, hidden: Sequence[Tensor], found: list[SampledRow]
    ) -> None:
        """Add what there is to report of prompts."""
        of_request = {row.request_id: row for row in found}
        for (row, work), states in zip(step.reads, hidden, strict=True):
            read = work.read(row.start, row.num_tokens, states, self.model)
            if read is None:
                continue
            result = of_request.get(row.request_id)
            if result is None:
                result = SampledRow(request_id=row.request_id, token_ids=[])
                found.append(result)
            result.prompt_logprobs, result.embedding = read.logprobs, read.embedding


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A `StepFuture`."""

    step_id: int
    runner: Runner
    step: _Step | None = None
    launched: LaunchedSamples | None = None

    def result(self) -> StepResult:
        if self.step is None or self.launched is None:
            return StepResult(step_id=self.step_id)
        with self.runner.backend.active():
            return self.runner.finish(self.step_id, self.step, self.launched)

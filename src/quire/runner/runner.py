"""Carries out plans: from a `StepPlan` to arrays for a backend, and from its samples to a `StepResult`.

A row may end in drafts (`PlannedRow.draft_token_ids`). Then a token is sampled after each draft, with the
request's own random stream. The result is these tokens up to the first one that differs from the next
draft: the same tokens as without drafts, in fewer steps. When they are known, the drafter is asked for the
drafts of the next plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import KVCache
from quire.errors import InvalidParameterError
from quire.kvtransfer.mover import Mover
from quire.messages import PlannedRow, SampledRow, StepPlan, StepResult
from quire.models.decoder import DecoderModel
from quire.runner.adapters import AdapterTable
from quire.runner.backend import LaunchedSamples, StepBackend, StepInput, StepSamples
from quire.runner.finished import FinishedStep
from quire.runner.prompt_work import PromptWork
from quire.runner.proposing import ask_for, propose, samples_of
from quire.runner.seats import Seats, independent
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import GrammarSource
from quire.speculative.base import Drafter, StateReader
from quire.structured.masks import Mask

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
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.drafter = drafter
        self.reader = drafter if isinstance(drafter, StateReader) else None
        model.taps = () if self.reader is None else self.reader.taps
        self.clock = clock
        self._max_num_seqs = max_num_seqs
        self._every = np.arange(max_num_seqs)
        self._grammars = grammars
        self._adapters = adapters
        self.store: Mover | None = None
        """Set when the cache is open, if KV is kept outside it."""

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
            adapters=self._adapters,
        )
        self.backend.open_cache(kv_cache, self.seats)
        if self.drafter is not None:
            self.drafter.open_cache(self.seats.step, kv_cache.num_blocks, kv_cache.block_size)

    def launch(self, plan: StepPlan) -> RunningStep | FinishedStep:
        """Apply the plan: release, admit, save, copy, load, compute, sample."""
        for request_id in plan.released:
            seat = self.seats.release(request_id)
            self.backend.release(seat)
            if self.drafter is not None:
                self.drafter.release(seat)
        for request in plan.admitted:
            self.backend.admit(self.seats.admit(request), request)
        if self.store is not None:
            self.store.save(plan)
        if plan.rows:
            return self._launch(plan)
        if plan.loads and self.drafter is not None:
            self.drafter.begin(plan, self.seats.seat_of)
        if self.store is not None:
            self.store.load(plan.loads)
        return FinishedStep(plan.step_id, self.store)

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        return self.backend.prepare()

    def _launch(self, plan: StepPlan) -> RunningStep:
        rows, seats, table = plan.rows, self.seats, []
        num_samples, has_drafts = 0, False
        for row in rows:
            seat = seats.seat_of[row.request_id]
            if row.new_block_ids:
                seats.add_blocks(seat, row.new_block_ids)
            if drafts := row.draft_token_ids:
                seats.bring(seat, row.start + row.num_tokens - len(drafts), drafts)
                has_drafts = True
            table.append((seat, row.start, row.num_tokens, row.samples))
            num_samples += row.samples
        if self.drafter is not None:
            self.drafter.begin(plan, seats.seat_of)
        for copies in independent(plan.copies):
            self.backend.copy(copies)
        if self.store is not None:
            self.store.load(plan.loads)  # it may take blocks that were just copied
        columns = seats.step.rows[: len(table)]
        columns[:] = table
        sample_rows = self._every[: len(table)]
        sample_seats, positions = columns[:, 0].copy(), columns[:, 1] + columns[:, 2]
        sampling: Sequence[PlannedRow] = rows
        draft_ids = None
        if has_drafts or num_samples < len(table):
            sampling = [row for row in rows if row.samples]
        if has_drafts:
            every = samples_of(sampling)
            sample_rows = np.repeat(sample_rows, columns[:, 3])
            sample_seats, (positions, draft_ids) = sample_seats[sample_rows], np.array(every)
        elif num_samples < len(table):
            sample_rows = np.repeat(sample_rows, columns[:, 3])
            sample_seats, positions = sample_seats[sample_rows], positions[sample_rows]
        seats.step.num_rows, seats.step.num_wanted = len(table), num_samples
        seats.step.has_adapters = seats.has_adapters(columns[:, 0])
        extras = None
        if has_drafts or seats.rules or seats.prompts:
            extras = self._extras(rows, columns, has_drafts)
        step = StepInput(
            rows=seats.step,
            sample_rows=sample_rows,
            sample_seats=sample_seats,
            positions=positions,
            drafts=draft_ids,
            read_rows=() if extras is None else list(extras.reads),
            masks=dict if extras is None else extras.masks,
        )
        return RunningStep(
            step_id=plan.step_id,
            runner=self,
            launched=self.backend.launch(step),
            rows=sampling,
            seats=sample_seats,
            positions=positions,
            num_released=seats.num_released,
            extras=extras,
        )

    def _extras(
        self,
        rows: Sequence[PlannedRow],
        columns: NDArray[np.int64],
        has_drafts: bool,
    ) -> _Extras:
        """What the step has besides plain rows. Writes to `columns` where hidden states are wanted."""
        seats = self.seats
        extras = _Extras(has_drafts)
        if seats.rules:
            index = 0
            for row, seat in zip(rows, columns[:, 0].tolist(), strict=True):
                if row.samples and seat in seats.rules:
                    extras.rules[index] = (seats.rules[seat], row.draft_token_ids)
                index += row.samples
        if not seats.prompts:
            return extras
        for index, (row, seat) in enumerate(zip(rows, columns[:, 0].tolist(), strict=True)):
            if (work := seats.prompts.get(seat)) is None:
                continue
            if wanted := work.wanted(row.start, row.num_tokens):
                columns[index, 3] = max(row.samples, wanted)
                extras.reads[index] = (row, work)
            if work.is_done(row.start + row.num_tokens):
                del seats.prompts[seat]
        seats.step.num_wanted = int(columns[:, 3].sum())
        return extras


@dataclass(slots=True)
class _Extras:
    """What only some steps have."""

    has_drafts: bool
    rules: dict[int, tuple[RequestRules, tuple[int, ...]]] = field(default_factory=dict)
    """By index of the row's first sample, with the row's drafts."""
    reads: dict[int, tuple[PlannedRow, PromptWork]] = field(default_factory=dict)
    """By index of the row, for the rows whose hidden states are read."""
    errors: dict[int, str] = field(default_factory=dict)
    """By index of the sample: the error, if no token is allowed."""

    def masks(self) -> dict[int, Mask]:
        found = {}
        for index, (rules, drafts) in self.rules.items():
            try:
                for mask in rules.masks_along(drafts):
                    if mask is not None:
                        found[index] = mask
                    index += 1
            except InvalidParameterError as error:
                self.errors[index] = str(error)
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
    """[R], like the next one: for each sample."""
    positions: NDArray[np.int64]
    num_released: int
    """The number of released requests when the step was launched."""
    extras: _Extras | None

    def result(self) -> StepResult:
        """Wait for the samples, and store the tokens in the seats."""
        samples, seats = self.launched.wait(), self.runner.seats
        if seats.num_released == self.num_released:
            seats.token_ids[self.seats, self.positions] = samples.token_ids
        else:
            kept = self._present()
            seats.token_ids[self.seats[kept], self.positions[kept]] = samples.token_ids[kept]
        if self.extras is not None and self.extras.has_drafts:
            found = self._verified(samples, self.extras.errors)
        else:
            found = [
                SampledRow(request_id=row.request_id, token_ids=[token])
                for row, token in zip(self.rows, samples.token_ids.tolist(), strict=True)
            ]
            for index, entry in samples.logprobs.items():
                found[index].logprobs = [entry]
            if not all(samples.valid.tolist()):  # 20 us less than NumPy's, with cold caches
                for index in np.flatnonzero(~samples.valid).tolist():
                    _fail(found[index], NAN_ERROR)
        if self.extras is not None:
            self._finish(self.extras, samples, found)
        if self.runner.reader is not None and samples.tapped is not None:
            self.runner.reader.read(samples.tapped)
        result = StepResult(step_id=self.step_id, sampled=found)
        if (drafter := self.runner.drafter) is not None:
            started = self.runner.clock()
            vocab_size = self.runner.model.spec.vocab_size
            asked = ask_for(self.rows, found, self.seats, self.positions, seats)
            if asked:
                propose(drafter, asked, seats, vocab_size)
                result.draft_seconds = self.runner.clock() - started
        if self.runner.store is not None:
            result.transferred = self.runner.store.collect()
        return result

    def _present(self) -> list[int]:
        """Indices of the samples whose seats still belong to their requests."""
        seat_of = self.runner.seats.seat_of
        owners = [seat_of.get(row.request_id) for row in self.rows for _ in range(row.samples)]
        pairs = enumerate(zip(owners, self.seats.tolist(), strict=True))
        return [index for index, (owned, seat) in pairs if owned == seat]

    def _verified(self, samples: StepSamples, errors: Mapping[int, str]) -> list[SampledRow]:
        """Results of the rows: the accepted drafts and the token after them. An error after a draft is left
        to the next step, which finds it again if the draft was right."""
        runner, token_ids, valid = self.runner, samples.token_ids.tolist(), samples.valid.tolist()
        found, begin = [], 0
        for row in self.rows:
            end = begin + 1
            for draft in row.draft_token_ids:
                if draft != token_ids[end - 1] or not valid[end] or end in errors:
                    break
                end += 1
            tokens = token_ids[begin:end]
            result = SampledRow(request_id=row.request_id, token_ids=tokens)
            if not valid[begin]:
                _fail(result, NAN_ERROR)
            elif begin in samples.logprobs:
                result.logprobs = [samples.logprobs[i] for i in range(begin, end)]
            seat = int(self.seats[begin])
            if row.draft_token_ids and runner.seats.seat_of.get(row.request_id) == seat:
                runner.seats.num_brought[seat] = self.positions[begin] + len(tokens)
                if len(tokens) > 1:
                    runner.backend.append(seat, tokens[1:])
            found.append(result)
            begin += row.samples
        return found

    def _finish(self, extras: _Extras, samples: StepSamples, found: list[SampledRow]) -> None:
        """Add the results of rules and of prompt work to those of the rows that sample."""
        row_of = [n for n, row in enumerate(self.rows) for _ in range(row.samples)]
        for index, (rules, _) in extras.rules.items():
            row = found[row_of[index]]
            if index in extras.errors:
                _fail(row, extras.errors[index])
            elif row.error is None and self.runner.seats.rules.get(int(self.seats[index])) is rules:
                row.token_ids += self._learn(index, rules, row.token_ids)
        if extras.reads:
            with self.runner.backend.active():
                self._read_prompts(extras.reads.values(), samples.hidden, found)

    def _learn(self, index: int, rules: RequestRules, token_ids: Sequence[int]) -> list[int]:
        """Apply tokens that were sampled with rules. Returns the grammar-forced tokens after them."""
        seats = self.runner.seats
        seat, end = int(self.seats[index]), int(self.positions[index]) + len(token_ids)
        for token in token_ids:
            rules.learn(token)
        forced = rules.forced(seats.max_model_len - end)
        seats.bring(seat, end - 1, [token_ids[-1], *forced])
        if forced:
            self.runner.backend.append(seat, forced)
        return forced

    def _read_prompts(
        self,
        reads: Iterable[tuple[PlannedRow, PromptWork]],
        hidden: Sequence[Tensor],
        found: list[SampledRow],
    ) -> None:
        """Add the results of prompt work."""
        of_request = {row.request_id: row for row in found}
        for (row, work), states in zip(reads, hidden, strict=True):
            read = work.read(
                row.start, row.num_tokens, states, self.runner.model, self.runner.backend.score
            )
            if read is None:
                continue
            result = of_request.get(row.request_id)
            if result is None:
                result = SampledRow(request_id=row.request_id, token_ids=[])
                found.append(result)
            result.prompt_logprobs, result.embedding = read.logprobs, read.embedding


def _fail(row: SampledRow, error: str) -> None:
    row.token_ids, row.logprobs, row.error = [], None, error

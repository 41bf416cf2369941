"""The steps that `quire bench fit` times: an engine core in this process, and requests that make each step
what it has to be.

A step's time is that of the whole `EngineCore.step`: the scheduler, the executor, and the outputs. Each cell
of the grid is measured several times in a row and again in a later round. The mean of a row counts, since a
run takes the sum of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from time import perf_counter

import numpy as np

from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.errors import EngineError
from quire.messages import AbortRequests, AddRequest, StepPlan
from quire.scheduler.cost_model import CostModel, Work, work_of

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
CONTEXTS = (16, 256, 1024)
COUNTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
STARTS = (0, 512, 2048)
GROUPS = ((4, 32), (8, 16), (4, 128), (16, 64))
"""Prompts in one step, and tokens of each."""
MIXED_ROWS, MIXED_COUNTS, MIXED_STARTS = (1, 4, 8, 16, 32, 64), (16, 48, 128, 512, 1024), (0, 1024)
DISTURBED = 1.5
"""A step counts as at most so many times the median of its row."""
MOST_FILL = 16_384
"""Tokens of contexts that are computed for the rows of one cell at most."""
REPEATS, MOST_REPEATS, LEAST_SECONDS = 3, 40, 0.1
"""A cell is measured so often, and short steps more often, until they have taken so long together."""


@dataclass(frozen=True, slots=True)
class Cell:
    """kind: "decode", "prefill" or "mixed"."""

    kind: str
    work: Work
    seconds: float


class _Watch(CostModel):
    """Instead of the scheduler's own: it remembers the last step, and nothing is decided by times."""

    done: Work | None = None

    def measure(self, plan: StepPlan, seconds: float) -> None:
        if plan.rows:
            self.done = work_of(plan.rows)


class Grid:
    """longest: tokens of a request at most."""

    def __init__(self, core: EngineCore, *, vocab_size: int, longest: int, seed: int = 0) -> None:
        self._core = core
        self._watch = core.scheduler.costs = _Watch()
        self._rng = np.random.default_rng(seed)
        self._vocab_size, self._longest = vocab_size, longest
        limits, kv = core.scheduler.limits, core.scheduler.kv
        self._seats, self._budget = limits.max_num_seqs, limits.max_num_batched_tokens
        self._room = (kv.num_usable - 1) * kv.block_size // max(1, len(kv.windows))
        self._block = kv.block_size
        self._next_id = 0
        self._base: list[int] = []
        """Tokens of which all are in the prefix cache."""

    def measure(self, rounds: int = 1) -> list[Cell]:
        """Of the rounds, the median counts."""
        self._warm()
        found = [list(self._round()) for _ in range(rounds)]
        return [
            replace(cells[0], seconds=median(cell.seconds for cell in cells))
            for cells in zip(*found, strict=True)
        ]

    # --- parts of the grid --------------------------------------------------------------------------

    def _round(self) -> Iterator[Cell]:
        for context in CONTEXTS:
            yield from self._decode(context)
        yield from self._prefill()
        for rows in MIXED_ROWS:
            yield from self._mixed(rows)

    def _warm(self) -> None:
        for count in (64, 1, min(512, self._budget, self._longest - 40)):
            self._add(self._tokens(count), 32)
        self._drain()

    def _fits(self, rows: int, context: int) -> bool:
        return (
            rows <= self._seats
            and context + 64 < self._longest
            and rows * (context + 256) < self._room
            and rows * context <= MOST_FILL
        )

    def _decode(self, context: int) -> Iterator[Cell]:
        running: list[int] = []
        for rows in ROWS:
            if not self._fits(rows, context):
                break
            running += self._run(rows - len(running), context)
            yield self._cell("decode", self._step)
        self._end(running)

    def _prefill(self) -> Iterator[Cell]:
        for start in STARTS:
            for count in COUNTS:
                if self._takes(start, count):
                    yield self._cell("prefill", partial(self._prompts, [count], start))
        for number, count in GROUPS:
            if number <= self._seats and self._takes(0, number * count):
                yield self._cell("prefill", partial(self._prompts, [count] * number, 0))

    def _mixed(self, rows: int) -> Iterator[Cell]:
        context = 128
        if rows + 1 > self._seats or not self._fits(rows + 1, context):
            return
        for start in MIXED_STARTS:
            if not self._takes(start, rows + MIXED_COUNTS[0]):
                break
            self._cache(start)
            running = self._run(rows, context)
            for count in MIXED_COUNTS:
                if self._takes(start, count + rows):
                    yield self._cell("mixed", partial(self._prompts, [count], start))
            self._end(running)

    # --- steps --------------------------------------------------------------------------------------

    def _takes(self, start: int, tokens: int) -> bool:
        return tokens <= self._budget and start + tokens + 8 < min(self._longest, self._room // 2)

    def _run(self, number: int, context: int) -> list[int]:
        """So many requests more generate."""
        ids = [self._add(self._tokens(context), self._longest - context - 1) for _ in range(number)]
        while any(
            request.num_computed_tokens < request.num_prompt_tokens
            for request in self._core.scheduler.requests.values()
        ):
            self._step()
        self._step()
        return ids

    def _cache(self, start: int) -> None:
        """So many tokens are in the prefix cache."""
        while len(self._base) < start:
            self._base += self._tokens(min(start - len(self._base), self._budget))
        if start:
            self._add(self._base[:start], 1)
            self._until_ended(self._next_id - 1)

    def _prompts(self, counts: Sequence[int], start: int) -> tuple[Work, float]:
        """The step of prompts of which `start` tokens are cached."""
        if len(counts) == 1 and start and not self._core.scheduler.running:
            self._cache(start)
        for count in counts:
            self._add(self._base[:start] + self._tokens(count), 1)
        work, seconds = self._step()
        if work.prompt_tokens != sum(counts):
            raise EngineError(
                f"a step computed {work.prompt_tokens} tokens of prompts, not {counts}."
            )
        return work, seconds

    def _step(self) -> tuple[Work, float]:
        self._watch.done, seconds = None, 0.0
        while (work := self._watch.done) is None:
            began = perf_counter()
            self._core.step()
            seconds = perf_counter() - began
        return work, seconds

    def _until_ended(self, request_id: int) -> None:
        while request_id in self._core.scheduler.requests:
            self._core.step()

    def _drain(self) -> None:
        while self._core.has_work:
            self._core.step()

    def _end(self, ids: list[int]) -> None:
        self._core.handle(AbortRequests(ids))
        self._drain()

    def _add(self, tokens: list[int], max_tokens: int) -> int:
        self._next_id += 1
        request_id = self._next_id - 1
        failed = self._core.handle(
            AddRequest(
                request_id=request_id,
                prompt_token_ids=tokens,
                decoding=Decoding(max_tokens=max_tokens),
                arrival_time=float(request_id),
            )
        )
        if failed is not None:
            raise EngineError(f"the engine refused a request of the grid: {failed}.")
        return request_id

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(10, self._vocab_size - 10, count).tolist()

    def _cell(self, kind: str, step: Callable[[], tuple[Work, float]]) -> Cell:
        steps: list[tuple[Work, float]] = []
        while len(steps) < REPEATS or (
            len(steps) < MOST_REPEATS and sum(seconds for _, seconds in steps) < LEAST_SECONDS
        ):
            steps.append(step())
        middle = Work(*map(median, zip(*(work for work, _ in steps), strict=True)))
        most = DISTURBED * median(seconds for _, seconds in steps)
        return Cell(kind, middle, fmean(min(seconds, most) for _, seconds in steps))

"""Drafts of heads that read the target's hidden states: EAGLE, EAGLE-3 and MTP.

For the token at position i a head takes the target's hidden state at i and the token at i + 1. So the last
state of a row is held until its next token is sampled. States of rejected drafts are dropped. The head's
first draft follows from the last known token; for each further one its own result takes the place of the
target's hidden state.

Hidden states exist only in the step that computes a token, so a head cannot compute what it has missed: the
tokens of a prefix hit, or those of a time in which no drafts were wanted. It attends over the blocks with
valid draft KV before the token, as far as there is no gap, and ignores all tokens before them. That costs
acceptance only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import AttentionMetadata
from quire.kernels.base import Kernels
from quire.kernels.program import StepRows
from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.messages import StepPlan
from quire.models.draft_head import DraftHead, HeadResult, load_head
from quire.speculative.base import DraftContext, DraftTask
from quire.speculative.draft_cache import DraftCache
from quire.speculative.spec import HeadDraftSpec
from quire.weights.source import open_source

MOST_HELD = 16
"""States of a request that wait for the next call. More are computed at once, without drafts."""
MOST_IDLE = 64
"""A request that wants no drafts for so many tokens costs the head nothing until it wants some again."""


@dataclass(slots=True)
class _Seat:
    num_known: int
    """Tokens known at admission."""
    first: int | None = None
    """The token of the first state that is held; None: nothing is held, and the head's context has a gap."""
    context: int = 0
    """First token of its context, the first of a block."""
    states: Tensor | None = None
    """[n, hidden_size]: those of the tokens from `first` on."""
    num_idle: int = 0
    """Tokens since drafts were wanted."""

    @property
    def end(self) -> int:
        return (self.first or 0) + (0 if self.states is None else len(self.states))


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens [start, start + count) of a seat to compute."""

    seat: int
    start: int
    count: int


class HeadDrafter:
    def __init__(
        self,
        head: DraftHead,
        kernels: Kernels,
        *,
        most: int,
        greedy: bool = False,
        max_model_len: int = 2**31,
    ) -> None:
        """most: drafts of a step. greedy: drafts are the likeliest tokens. max_model_len: longer requests
        get no drafts."""
        self._head, self._kernels = head, kernels
        self._most, self._greedy, self._longest = most, greedy, max_model_len
        self.taps = head.spec.taps

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        self._rows = rows
        self._block_size = block_size
        self._cache = DraftCache(
            rows,
            num_blocks,
            block_size,
            num_layers=1,
            heads=self._head.spec.layer.attention.heads,
            most_drafts=self._most,
            dtype=self._head.dtype,
            kernels=self._kernels,
        )
        self._tables = rows.block_ids[0]
        self._seats: dict[int, _Seat] = {}
        self._samples = np.zeros(len(rows.token_ids), dtype=SAMPLE_ROW)
        self._num_random = 0

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        self._cache.begin(plan, seat_of)
        for request in plan.admitted:
            seat = seat_of[request.request_id]
            self._seats[seat] = _Seat(len(request.token_ids))
            self._samples[seat] = sample_row(request.decoding)
            self._num_random += not request.decoding.is_greedy

    def release(self, seat: int) -> None:
        self._cache.release(seat)
        del self._seats[seat]
        self._num_random -= bool(self._samples[seat]["temperature"] > 0)
        self._samples[seat] = 0

    # --- hidden states --------------------------------------------------------------------------------

    def read(self, tapped: Tensor) -> None:
        """As `StateReader.read`."""
        taken, begin = [], 0
        for seat, start, count, _ in self._rows.rows[: self._rows.num_rows].tolist():
            skipped = self._skipped(self._seats[seat], seat, start, count)
            if skipped < count:
                taken.append((seat, start + skipped, begin + skipped, begin + count))
            begin += count
        if not taken:
            return
        states = self._head.states(tapped)
        if states is tapped:
            states = states.clone()  # its memory is the next step's
        ready = []
        for seat, start, first, last in taken:
            held = self._seats[seat]
            new = states[first:last]
            if held.states is not None and held.first is not None and held.first < start:
                new = torch.cat((held.states[: start - held.first], new))
            held.states = new
            # The token after a state is known inside the prompt, and before the row.
            count = min(held.end, max(start, held.num_known - 1)) - (held.first or 0)
            if count >= MOST_HELD:
                ready.append(_Row(seat, held.first or 0, count))
        if ready:
            self._compute(ready, wanted=[])

    def _skipped(self, held: _Seat, seat: int, start: int, count: int) -> int:
        """How many of a row's first states are not needed."""
        held.num_idle += count if start + count >= held.num_known else 0
        if held.num_idle > MOST_IDLE:
            held.first = held.states = None
            return count
        if held.first is not None and held.first <= start <= held.end:
            return 0  # after rejected drafts, start is before the end
        held.first, held.context = self._cache.join(seat, start)
        held.states = None
        if held.first >= start + count:
            held.first = None
            return count
        return held.first - start

    # --- drafts ---------------------------------------------------------------------------------------

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        made: list[list[int]] = [[] for _ in tasks]
        numbers, rows, most = [], [], []
        for number, task in enumerate(tasks):
            held, last = self._seats[task.seat], task.num_tokens - 2
            if last + 1 + task.most >= self._longest:
                continue
            held.num_idle = 0
            if held.first is None or not held.first <= last < held.end:
                continue
            # Drafts but the last are computed too, after the last known token but one.
            fits = self._cache.lend(task.seat, last + task.most)
            numbers.append(number)
            rows.append(_Row(task.seat, held.first, last + 1 - held.first))
            most.append(task.most if fits else 1)
        if not rows:
            return made
        ends = np.cumsum([row.count for row in rows])
        result = self._compute(rows, wanted=(ends - 1).tolist())
        for row in rows:
            held = self._seats[row.seat]
            held.first, held.states = row.start + row.count, None
        alive = list(range(len(rows)))
        while result is not None:
            seats = [rows[i].seat for i in alive]
            found, valid = self._draw(
                result.hidden,
                seats,
                [tasks[numbers[i]].num_tokens + len(made[numbers[i]]) for i in alive],
            )
            left = []
            for place, i in enumerate(alive):
                if valid[place]:
                    made[numbers[i]].append(found[place])
                    if len(made[numbers[i]]) < most[i]:
                        left.append(place)
            if not left:
                break
            alive = [alive[place] for place in left]
            result = self._recycle(
                result, left, [rows[i] for i in alive], [made[numbers[i]] for i in alive]
            )
        return made

    def _compute(self, rows: Sequence[_Row], wanted: Sequence[int]) -> HeadResult | None:
        """Known tokens, whose states are held. wanted: indices among all tokens."""
        ids = [
            self._rows.token_ids[row.seat, row.start + 1 : row.start + row.count + 1]
            for row in rows
        ]
        states = []
        for row in rows:
            held = self._seats[row.seat]
            assert held.states is not None and held.first == row.start
            states.append(held.states[: row.count])
            held.first, held.states = row.start + row.count, held.states[row.count :].clone()
            self._cache.computed(row.seat, held.first)
        return self._run(rows, np.concatenate(ids), torch.cat(states), wanted)

    def _recycle(
        self,
        result: HeadResult,
        places: Sequence[int],
        rows: Sequence[_Row],
        made: Sequence[Sequence[int]],
    ) -> HeadResult | None:
        """The next pass after each row's drafts. places: in the last result."""
        after = [
            _Row(row.seat, row.start + row.count + len(drafts) - 1, 1)
            for row, drafts in zip(rows, made, strict=True)
        ]
        ids = np.array([drafts[-1] for drafts in made])
        return self._run(after, ids, result.state[torch.tensor(places)], list(range(len(after))))

    def _run(
        self,
        rows: Sequence[_Row],
        next_ids: NDArray[np.int64],
        states: Tensor,
        wanted: Sequence[int],
    ) -> HeadResult | None:
        return self._head.compute(
            torch.from_numpy(next_ids),
            states,
            self._metadata(rows),
            self._cache.kv,
            torch.tensor(wanted, dtype=torch.int64),
        )

    def _metadata(self, rows: Sequence[_Row]) -> AttentionMetadata:
        """Block tables and lengths begin with each seat's context; positions do not."""
        size, tables = self._block_size, self._tables
        contexts = [self._seats[row.seat].context for row in rows]
        lens = [
            row.start + row.count - context for row, context in zip(rows, contexts, strict=True)
        ]
        width = -(-max(lens) // size)
        blocks = np.zeros((len(rows), width), dtype=np.int32)
        positions, slots = [], []
        for into, row, context, length in zip(blocks, rows, contexts, lens, strict=True):
            first, count = context // size, -(-length // size)
            into[:count] = tables[row.seat, first : first + count]
            at = np.arange(row.start, row.start + row.count)
            positions.append(at)
            slots.append(tables[row.seat, at // size].astype(np.int64) * size + at % size)
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        starts[1:] = np.cumsum([row.count for row in rows])
        return AttentionMetadata(
            positions=torch.from_numpy(np.concatenate(positions)),
            slot_mapping=torch.from_numpy(np.concatenate(slots)),
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_table=torch.from_numpy(blocks),
        )

    def _draw(
        self, hidden: Tensor, seats: Sequence[int], positions: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """A token of the target for each row, and whether it is valid. positions: where it would be."""
        logits, ids = self._head.logits(hidden), self._head.token_ids
        samples = None
        if self._num_random and not self._greedy:
            samples = self._samples.take(seats)
            samples["position"] = positions
            if ids is not None:  # noise and filters are those of the target's tokens
                every = torch.full((len(logits), self._head.spec.target.vocab_size), -torch.inf)
                every[:, ids] = logits
                logits, ids = every, None
        found = self._kernels.sample(logits, samples)
        tokens = torch.from_numpy(found.token_ids)
        return (tokens if ids is None else ids[tokens]).tolist(), found.valid.tolist()


def create(context: DraftContext) -> HeadDrafter:
    """Raises `CheckpointError` as loading any model does."""
    draft, options = context.draft, context.options
    assert isinstance(draft, HeadDraftSpec), "the configuration was resolved without a head"
    head = load_head(
        draft.head,
        open_source(draft.directory),
        context.target,
        kernels=context.kernels,
        random_seed=context.seed if context.load_format == "dummy" else None,
    )
    return HeadDrafter(
        head,
        context.kernels,  # type: ignore[arg-type]
        most=options.num_speculative_tokens,
        greedy=options.draft_sample_method == "greedy",
        max_model_len=draft.max_model_len,
    )

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
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import AttentionMetadata
from quire.kernels.base import Kernels
from quire.kernels.program import StepRows
from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.messages import StepPlan
from quire.models.copies import load_copies
from quire.models.draft_head import DraftHead, HeadResult, load_head
from quire.speculative.base import DraftContext, DraftTask
from quire.speculative.draft_cache import DraftCache
from quire.speculative.spec import HeadDraftSpec
from quire.weights.source import open_source

LEAST_PROMPT = 16
"""So many tokens of a prompt are computed at once; fewer wait for the first drafts."""
MOST_IDLE = 64
"""A request that wants no drafts for so many tokens costs nothing until it wants some again."""
LEAST_SHARE = 0.05
"""Where fewer of the requests want drafts, only each `ONE_IN`-th new one is followed from its first token, so
that there are drafts to find out whether they pay."""
ONE_IN = 16
SHARE_MEMORY = 0.95


@dataclass(slots=True)
class _Seat:
    num_known: int
    """Tokens known at admission."""
    num_idle: int
    """Tokens since drafts were wanted."""
    first: int | None = None
    """The first token whose state is held; None: none is, and the head's context has a gap."""
    end: int = 0
    context: int = 0
    """First token of its context, the first of a block."""
    parts: list[Tensor] = field(default_factory=list)
    """What is tapped of the tokens from `first` to `end`."""

    def hold(self, start: int, tapped: Tensor) -> None:
        """tapped: of the tokens from `start` on, which may be before the end: after rejected drafts."""
        while self.end > start:
            last = self.parts.pop()
            self.end -= len(last)
            if self.end < start:
                self.parts.append(last[: start - self.end])
                self.end = start
        self.parts.append(tapped)
        self.end += len(tapped)

    def drop(self) -> None:
        self.first, self.parts = None, []


@dataclass(slots=True)
class _Row:
    """Tokens [start, end) of a seat to compute, and the drafts that follow."""

    seat: int
    start: int
    end: int
    most: int = 0
    drafts: list[int] = field(default_factory=list)


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
        self._num_random = self._num_admitted = self._num_asked = 0
        self._share = 1.0
        """Of the requests that could want drafts: how many did lately."""

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        self._cache.begin(plan, seat_of)
        for request in plan.admitted:
            seat = seat_of[request.request_id]
            self._num_admitted += 1
            follows = self._share > LEAST_SHARE or self._num_admitted % ONE_IN == 0
            self._seats[seat] = _Seat(len(request.token_ids), 0 if follows else MOST_IDLE + 1)
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
        kept: Tensor | None = None
        ready, stop, num_sampled = [], 0, 0
        for seat, start, count, _ in self._rows.rows[: self._rows.num_rows].tolist():
            held, end, stop = self._seats[seat], start + count, stop + count
            if end >= held.num_known:
                num_sampled += 1
                held.num_idle += count
            if held.num_idle > MOST_IDLE:
                held.drop()
                continue
            if held.first is None or not held.first <= start <= held.end:
                held.drop()
                held.first, held.context = self._cache.join(seat, start)
                held.end = held.first
            first = max(start, held.first)
            if first >= end:
                held.drop()
                continue
            if kept is None:
                kept = tapped.clone()  # its memory is the next step's
            held.hold(first, kept[stop - (end - first) : stop])
            inside = min(end, held.num_known - 1)  # the token after each of these is known
            if inside - held.first >= LEAST_PROMPT:
                ready.append(_Row(seat, held.first, inside))
        if num_sampled:
            share, self._num_asked = min(1.0, self._num_asked / num_sampled), 0
            self._share = SHARE_MEMORY * self._share + (1 - SHARE_MEMORY) * share
        if ready:
            self._compute(ready, wanted=[])

    # --- drafts ---------------------------------------------------------------------------------------

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        self._num_asked += len(tasks)
        made, rows = [], []
        for task in tasks:
            held, end = self._seats[task.seat], task.num_tokens - 1
            row = _Row(task.seat, held.first or 0, end, task.most)
            made.append(row.drafts)
            if end + task.most >= self._longest:
                continue
            held.num_idle = 0
            if held.first is None or not held.first < end <= held.end:
                continue
            # Each draft but the last is computed too, from the slot after the last known token but one.
            if not self._cache.lend(task.seat, end + task.most - 1):
                row.most = 1
            rows.append(row)
        if not rows:
            return made
        stops = np.cumsum([row.end - row.start for row in rows])
        result = self._compute(rows, wanted=(stops - 1).tolist())
        while result is not None:
            found, valid = self._draw(result.hidden, rows)
            for row, token, is_valid in zip(rows, found, valid, strict=True):
                if is_valid:
                    row.drafts.append(token)
                else:
                    row.most = 0
            left = [i for i, row in enumerate(rows) if len(row.drafts) < row.most]
            if not left:
                break
            rows = [rows[i] for i in left]
            # The result at the last token, and its draft, are the inputs at the next one.
            after = [_Row(row.seat, at := row.end + len(row.drafts) - 1, at + 1) for row in rows]
            ids = np.array([row.drafts[-1] for row in rows])
            states = result.state[torch.tensor(left)]
            result = self._run(after, ids, states, wanted=range(len(rows)))
        return made

    def _compute(self, rows: Sequence[_Row], wanted: Sequence[int]) -> HeadResult | None:
        """Known tokens, from the first that is held. wanted: indices among all tokens."""
        ids, tapped = [], []
        for row in rows:
            held = self._seats[row.seat]
            ids.append(self._rows.token_ids[row.seat, row.start + 1 : row.end + 1])
            whole = torch.cat(held.parts) if len(held.parts) > 1 else held.parts[0]
            count = row.end - row.start
            tapped.append(whole[:count])
            held.first, held.end, held.parts = row.end, row.end, []
            if count < len(whole):
                held.hold(row.end, whole[count:].clone())
            self._cache.computed(row.seat, row.end)
        states = self._head.states(torch.cat(tapped))
        return self._run(rows, np.concatenate(ids), states, wanted)

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
        lens = [row.end - context for row, context in zip(rows, contexts, strict=True)]
        blocks = np.zeros((len(rows), -(-max(lens) // size)), dtype=np.int32)
        positions, slots = [], []
        for into, row, context, length in zip(blocks, rows, contexts, lens, strict=True):
            first, count = context // size, -(-length // size)
            into[:count] = tables[row.seat, first : first + count]
            at = np.arange(row.start, row.end)
            positions.append(at)
            slots.append(tables[row.seat, at // size].astype(np.int64) * size + at % size)
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        starts[1:] = np.cumsum([row.end - row.start for row in rows])
        return AttentionMetadata(
            positions=torch.from_numpy(np.concatenate(positions)),
            slot_mapping=torch.from_numpy(np.concatenate(slots)),
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_table=torch.from_numpy(blocks),
        )

    def _draw(self, hidden: Tensor, rows: Sequence[_Row]) -> tuple[list[int], list[bool]]:
        """A token of the target for each row, and whether it is valid."""
        logits, ids = self._head.logits(hidden), self._head.token_ids
        samples = None
        if self._num_random and not self._greedy:
            samples = self._samples.take([row.seat for row in rows])
            samples["position"] = [row.end + 1 + len(row.drafts) for row in rows]
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
    target, copies = context.target, None
    random_seed = context.seed if context.load_format == "dummy" else None
    if draft.copied_from is not None:
        copies = load_copies(
            draft.head,
            open_source(draft.copied_from),
            dtype=target.dtype,
            kernels=target.kernels,
            random_seed=random_seed,
        )
    head = load_head(
        draft.head,
        open_source(draft.directory),
        target,
        kernels=target.kernels,
        random_seed=random_seed,
        copies=copies,
    )
    return HeadDrafter(
        head,
        target.kernels,  # type: ignore[arg-type]
        most=options.num_speculative_tokens,
        greedy=options.draft_sample_method == "greedy",
        max_model_len=draft.max_model_len,
    )

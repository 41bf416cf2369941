"""An executor with no model that checks, token by token, what a real one would rely on.

Every slot of its "KV cache" holds the group of layers and the whole prefix that were written there. Reading a
row's context through its block tables, as far as each group's window reaches, must find exactly the row's own
prefix, so any sharing of the wrong block, missing copy or reuse of a live block fails at once. The sampled
token is a hash of the prefix, the seed and the adapter: what a request produces cannot depend on how it was
scheduled. A plan is carried out when it is launched, however late its result is taken, and tokens are fed
back on this side alone. Drafts come from a script, which may be wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from quire.executor.base import Done
from quire.messages import (
    AdmittedRequest,
    PlannedRow,
    SampledRow,
    StepPlan,
    StepResult,
    TransferResult,
)

Drafter = Callable[[tuple[int, ...], int], list[int]]
"""From a request's tokens and seed, what may follow."""


def next_token(
    tokens: tuple[int, ...], seed: int, vocab_size: int, adapter: str | None = None
) -> int:
    known = (tokens, seed) if adapter is None else (tokens, seed, adapter)
    digest = hashlib.blake2b(repr(known).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % vocab_size


@dataclass
class _State:
    tokens: list[int]
    block_ids: list[list[int]]
    """By group."""
    seed: int
    adapter: str | None


class FakeAdapters:
    """An `AdapterStore` that has loaded an adapter after it was polled `polls` times. `failing`: keys that
    cannot be loaded. Checks that no more than `most` are in memory."""

    def __init__(self, most: int, *, polls: int = 1, failing: frozenset[str] = frozenset()) -> None:
        self.most = most
        self.polls = polls
        self.failing = failing
        self.ready: set[str] = set()
        self.loads: list[str] = []
        self._loading: dict[str, int] = {}

    def load(self, key: str, path: Path) -> None:
        assert key not in self.ready and str(path) == f"/adapters/{key}"
        self.loads.append(key)
        self._loading[key] = self.polls
        assert len(self.ready) + len(self._loading) <= self.most

    def poll(self) -> list[FakeLoad]:
        ended = []
        for key in list(self._loading):
            self._loading[key] -= 1
            if self._loading[key] <= 0:
                del self._loading[key]
                bad = key in self.failing
                ended.append(FakeLoad(key, "it is broken" if bad else None))
                self.ready |= set() if bad else {key}
        return ended

    def wait(self, seconds: float) -> None:
        pass

    def drop(self, key: str) -> None:
        self.ready.remove(key)


class FakeLoad(NamedTuple):
    key: str
    error: str | None


class CheckingExecutor:
    """on_plan: called with each plan before it is carried out. Counts drafts and those that were right.
    windows: of each group of layers; None attends to all."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        vocab_size: int = 50,
        max_in_flight: int = 1,
        on_plan: Callable[[StepPlan], None] = lambda plan: None,
        drafter: Drafter = lambda tokens, seed: [],
        windows: Sequence[int | None] = (None,),
        adapters: FakeAdapters | None = None,
    ) -> None:
        self.block_size = block_size
        self.max_in_flight = max_in_flight
        self.on_plan = on_plan
        self.drafter = drafter
        self.windows = windows
        self.adapters = adapters
        self.num_drafts = self.num_accepted = 0
        self.vocab_size = vocab_size
        self.slots: list[tuple[int, str | None, tuple[int, ...]] | None] = [None] * (
            num_blocks * block_size
        )
        self.states: dict[int, _State] = {}
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> Done:
        self.on_plan(plan)
        for request_id in plan.released:
            del self.states[request_id]
        for admitted in plan.admitted:
            self._admit(admitted)
        self.save(plan)
        for source, destination in plan.copies:
            self._copy(source, destination)
        transferred = self.load(plan)
        for row in plan.rows:
            state = self.states[row.request_id]
            if row.new_block_ids:
                for table, new in zip(state.block_ids, row.new_block_ids, strict=True):
                    assert 0 not in new, "the null block was handed out"
                    table.extend(new)
            assert len({len(table) for table in state.block_ids}) == 1
        for row in plan.rows:
            adapter = self.states[row.request_id].adapter
            assert adapter is None or adapter in self.adapters.ready, "it was dropped"
            self._write(row)
        for row in plan.rows:
            self._read(row)
        sampled = [self._sample(row) for row in plan.rows if row.samples]
        return Done(StepResult(step_id=plan.step_id, sampled=sampled, transferred=transferred))

    def save(self, plan: StepPlan) -> None:
        """Before copies, loads and rows."""
        assert not plan.saves and not plan.clears_stores, "there is no store"

    def load(self, plan: StepPlan) -> list[TransferResult]:
        """After copies, before rows. Returns the loads that are over."""
        assert not plan.loads, "there is no store"
        return []

    def _sample(self, row: PlannedRow) -> SampledRow:
        state, tokens = self.states[row.request_id], []
        for draft in [*row.draft_token_ids, None]:
            tokens.append(
                next_token(tuple(state.tokens), state.seed, self.vocab_size, state.adapter)
            )
            state.tokens.append(tokens[-1])
            if draft != tokens[-1]:
                break
            if next_token(tuple(state.tokens), -1, self.vocab_size) == self.vocab_size - 1:
                break  # sometimes nothing can be sampled after a draft, and the next step has to
        self.num_drafts += len(row.draft_token_ids)
        self.num_accepted += len(tokens) - 1
        drafts = tuple(self.drafter(tuple(state.tokens), state.seed)) if row.num_drafts else ()
        return SampledRow(request_id=row.request_id, token_ids=tokens, draft_token_ids=drafts)

    def close(self) -> None:
        pass

    def _admit(self, admitted: AdmittedRequest) -> None:
        assert admitted.request_id not in self.states
        assert len(admitted.block_ids) == len(self.windows)
        tables = [list(table) for table in admitted.block_ids]
        for table, window in zip(tables, self.windows, strict=True):
            assert window is not None or 0 not in table, "the null block was handed out"
        adapter = admitted.placement.adapter
        if adapter is not None:
            assert self.adapters is not None and adapter in self.adapters.ready
        self.states[admitted.request_id] = _State(
            list(admitted.token_ids), tables, admitted.decoding.seed, adapter
        )

    def _copy(self, source: int, destination: int) -> None:
        size = self.block_size
        for offset in range(size):
            self.slots[destination * size + offset] = self.slots[source * size + offset]

    def _slot(self, state: _State, group: int, position: int) -> int:
        index, offset = divmod(position, self.block_size)
        block_id = state.block_ids[group][index]
        assert block_id, "the null block is read or written"
        return block_id * self.block_size + offset

    def _write(self, row: PlannedRow) -> None:
        state = self.states[row.request_id]
        reach = row.start + row.num_tokens
        known = reach - len(row.draft_token_ids)
        if known == len(state.tokens):
            assert row.samples == 1 + len(row.draft_token_ids)
        else:
            assert not row.samples and not row.draft_token_ids
        tokens = (*state.tokens[:known], *row.draft_token_ids)
        self.tokens_computed += row.num_tokens
        for group in range(len(self.windows)):
            for position in range(row.start, reach):
                written = (group, state.adapter, tokens[: position + 1])
                self.slots[self._slot(state, group, position)] = written

    def _read(self, row: PlannedRow) -> None:
        state = self.states[row.request_id]
        tokens = (*state.tokens, *row.draft_token_ids)
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, row.start - window + 1)
            for position in range(first, row.start + row.num_tokens):
                held = self.slots[self._slot(state, group, position)]
                assert held == (group, state.adapter, tokens[: position + 1]), (
                    f"request {row.request_id} reads foreign KV at position {position}"
                )


def expected_output(
    prompt: list[int],
    seed: int,
    max_tokens: int,
    *,
    vocab_size: int = 50,
    eos: int | None = None,
    adapter: str | None = None,
) -> list[int]:
    """What a request must produce, whatever the schedule."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        token = next_token(tuple(tokens), seed, vocab_size, adapter)
        tokens.append(token)
        if token == eos:
            break
    return tokens[len(prompt) :]

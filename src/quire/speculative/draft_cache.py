"""The KV cache of a draft model, which uses the block ids of the target's.

So prefix hits, forks and preemption need no second manager: a block that the target finds may have the
draft's keys and values too. For each block there is a count of its leading tokens for which they are valid.
A draft catches up when drafts are wanted, not before. Validity decides how good drafts are, and never a
token.

* A block that a request is given empty has no valid tokens, whatever it held before; nor has one that is
  loaded from a store, which has the target's KV alone.
* A copied block has as many as its source, and at most as many as the request takes over.
* After a proposal, all known tokens are valid. Drafts that were computed are too, if they turn out right:
  the seat remembers them.
* Drafts may need slots beyond the request's blocks. They are in spare blocks that no request has, and
  are lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quire.attention.base import KVCache
from quire.kernels.base import Kernels
from quire.kernels.program import StepRows
from quire.layers.spec import HeadShape
from quire.messages import StepPlan


@dataclass(slots=True)
class _Seat:
    num_blocks: int
    num_valid: int = 0
    """Its leading tokens with valid KV."""
    guessed: Sequence[int] = ()
    """Drafts of which KV was computed after them."""


class DraftCache:
    def __init__(
        self,
        rows: StepRows,
        num_blocks: int,
        block_size: int,
        *,
        num_layers: int,
        heads: HeadShape,
        most_drafts: int,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """rows: the target's arrays; the block tables of its first group are used. Entries after a
        request's own blocks are written here, which nobody reads before they are written again."""
        self._kernels = kernels
        self._block_size = block_size
        self._tokens, self._tables = rows.token_ids, rows.block_ids[0]
        max_num_seqs, self._max_blocks = self._tables.shape
        self._num_spare = -(-most_drafts // block_size)
        self._first_spare = num_blocks
        self.kv = KVCache(
            num_parts=num_layers,
            num_blocks=num_blocks + max_num_seqs * self._num_spare,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            block_size=block_size,
            dtype=dtype,
            kernels=kernels,
        )
        self._valid = np.zeros(num_blocks, dtype=np.int32)
        """Of each block: how many leading tokens have valid KV."""
        self._seats: dict[int, _Seat] = {}

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        """As `Drafter.begin`."""
        for load in plan.loads:
            self._valid[load.block_ids] = 0
        starts = {row.request_id: row.start for row in plan.rows} if plan.admitted else {}
        for request in plan.admitted:
            blocks = request.block_ids[0]
            self._seats[seat_of[request.request_id]] = _Seat(len(blocks))
            self._valid[blocks[-(-starts[request.request_id] // self._block_size) :]] = 0
        for row in plan.rows:
            if row.new_block_ids:
                new = row.new_block_ids[0]
                self._valid[new] = 0
                self._seats[seat_of[row.request_id]].num_blocks += len(new)
        for source, target in plan.copies:
            if source < len(self._valid) and self._valid[source]:
                self._kernels.copy_blocks(self.kv.pairs, [(source, target)])
            self._valid[target] = self._valid[source]
        for request in plan.admitted:  # a copied block may hold more tokens than are taken over
            index, count = divmod(starts[request.request_id], self._block_size)
            if count:
                block = request.block_ids[0][index]
                self._valid[block] = min(self._valid[block], count)

    def release(self, seat: int) -> None:
        self._seats.pop(seat, None)

    def first_missing(self, seat: int, num_tokens: int) -> int:
        """The first of the request's tokens that has to be computed, to have logits after the last one."""
        state, size = self._seats[seat], self._block_size
        at = state.num_valid
        if state.guessed:
            known = self._tokens[seat, at : min(num_tokens, at + len(state.guessed))].tolist()
            for token, guess in zip(known, state.guessed, strict=False):
                if token != guess:
                    break
                at += 1
        if num_tokens - at > 1:  # others may have computed some of its blocks
            blocks, own = self._tables[seat], state.num_blocks * size
            while (
                at < min(num_tokens, own)
                and (valid := int(self._valid[blocks[at // size]])) > at % size
            ):
                at += valid - at % size
                if valid < size:
                    break
        return min(at, num_tokens - 1)

    def join(self, seat: int, start: int) -> tuple[int, int]:
        """For a draft that cannot catch up: the first token from `start` on that may be computed next, and
        the first of the blocks before it that are valid without a gap."""
        state, size, tables = self._seats[seat], self._block_size, self._tables[seat]
        index, before = divmod(start, size)
        if before and self._valid[tables[index]] < before:
            index += 1
            first, begin = index * size, index
        else:
            first, begin = start, index
            while begin and self._valid[tables[begin - 1]] == size:
                begin -= 1
        state.num_valid = first
        return first, begin * size

    def block_of(self, seat: int, position: int) -> int:
        return int(self._tables[seat, position // self._block_size])

    def lend(self, seat: int, reach: int) -> bool:
        """Give the seat slots for tokens before index `reach`, until its next own blocks. False if that is
        beyond its table."""
        have = self._seats[seat].num_blocks
        missing = -(-reach // self._block_size) - have
        if missing <= 0:
            return True
        if missing > self._num_spare or have + missing > self._max_blocks:
            return False
        first = self._first_spare + seat * self._num_spare
        self._tables[seat, have : have + missing] = range(first, first + missing)
        return True

    def computed(self, seat: int, num_tokens: int, guessed: Sequence[int] = ()) -> None:
        """The KV of that many known tokens is valid now, and after them that of guessed ones."""
        state, size = self._seats[seat], self._block_size
        own = state.num_blocks * size - num_tokens  # the last token may be in a lent slot
        num_tokens += min(0, own)
        for index in range(state.num_valid // size, -(-num_tokens // size)):
            self._valid[self._tables[seat, index]] = min(size, num_tokens - index * size)
        state.num_valid = num_tokens
        state.guessed = guessed[: max(0, own)]

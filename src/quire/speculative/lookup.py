"""Drafts from texts: what followed the last tokens where they occurred before.

A request's own tokens are one text. Past outputs are others, in a ring of bounded size: the oldest are
overwritten. For each position, an index has a link to the latest earlier one whose last `anchor` tokens
fall into the same bucket of a hash table. A search follows the links of the text's end: it compares at most
32 occurrences backwards, token by token, so hashes decide only what is compared. Its cost does not depend
on the length of the texts.

With votes (suffix decoding, arXiv 2411.04975, here without trees): the occurrences that agree in at least m
tokens propose their continuations, and at each step the one that most of them have is followed while its
share of votes, multiplied over the steps, is large enough. The m with the largest sum of these products is
chosen: the expected number of accepted drafts. Without votes (prompt lookup): the continuation of the
longest occurrence, the latest if several are.

An occurrence counts only if its text has the asker's owner. C (kernels/cpu/lookup.c) does the same with the
same results; the code here serves where there is no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.lookup import LookupJob, TextIndex, add_text, look_up
from quire.kernels.program import StepRows
from quire.placement import Placement
from quire.speculative.base import DraftTask

MOST_FOUND, MOST_VISITED = 32, 64
NO_LIMIT = (1 << 62) - 1


@dataclass(frozen=True, slots=True)
class LookupRules:
    anchor: int
    """The shortest suffix that is found."""
    depth: int
    """The longest that is compared."""
    most: int
    """Drafts of a step."""
    factor: float
    """Drafts for each token that agrees."""
    votes: bool = False
    least: float = 0.0
    """With votes: the smallest share that is followed."""


def owner_of(placement: Placement) -> int:
    """Whose texts may become drafts for a request: those of the same tenant, salt and adapter."""
    parts = (placement.tenant, placement.cache_salt, placement.adapter)
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class Lookup:
    def __init__(
        self,
        rows: StepRows,
        rules: LookupRules,
        *,
        capacity: int = 0,
        most_texts: int = 0,
        plain: bool = False,
    ) -> None:
        """rows: whose `token_ids` are the requests' texts. capacity: tokens of past outputs, a power of
        two; 0 for none. most_texts: past outputs that are kept. plain: do not use C."""
        seats, length = rows.token_ids.shape
        self.rules, self._rows = rules, rows
        self._bits = min(15, max(6, length.bit_length() - 1))
        self._links = np.zeros((seats, length), dtype=np.int32)
        self._heads = np.zeros((seats, 1 << self._bits), dtype=np.int64)
        self._indexed = np.zeros(seats, dtype=np.int64)
        self._owners = np.zeros(seats, dtype=np.int64)
        self._tasks = np.zeros((seats, 3), dtype=np.int64)
        self._drafts = np.zeros((seats, rules.most), dtype=np.int64)
        self._counts = np.zeros(seats, dtype=np.int64)
        self.shared = SharedTexts(capacity, most_texts) if capacity else None
        self._native = not plain and _has_library()
        address = {
            name: getattr(self, f"_{name}").ctypes.data
            for name in ("indexed", "owners", "tasks", "drafts", "counts")
        }
        self._job = LookupJob(
            own=TextIndex(
                tokens=rows.token_ids.ctypes.data,
                links=self._links.ctypes.data,
                heads=self._heads.ctypes.data,
                mask=NO_LIMIT,
                bucket_bits=self._bits,
            ),
            shared=None if self.shared is None else self.shared.address,
            token_stride=length,
            bucket_stride=1 << self._bits,
            most=rules.most,
            anchor=rules.anchor,
            depth=rules.depth,
            votes=rules.votes,
            factor=rules.factor,
            least=rules.least,
            **address,
        )

    def admit(self, seat: int, owner: int) -> None:
        self._heads[seat] = 0
        self._indexed[seat] = 0
        self._owners[seat] = owner

    def add(self, text: NDArray[np.int64], owner: int) -> None:
        """Keep a past output."""
        if self.shared is not None:
            self.shared.add(text, owner, self.rules.anchor, native=self._native)

    def propose(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        count = len(tasks)
        self._tasks[:count] = [(task.seat, task.num_tokens, task.most) for task in tasks]
        if not self._native:
            return [self._propose(task) for task in tasks]
        self._job.num_tasks = count
        look_up(self._job)
        if count == 1:
            return [self._drafts[0, : self._counts[0]].tolist()]
        made = self._drafts[:count].tolist()
        return [drafts[:n] for drafts, n in zip(made, self._counts[:count].tolist(), strict=True)]

    # --- the plain version ------------------------------------------------------------------------

    def _propose(self, task: DraftTask) -> list[int]:
        seat, n, anchor = task.seat, task.num_tokens, self.rules.anchor
        own = _Index(
            self._rows.token_ids[seat],
            None,
            self._links[seat],
            self._heads[seat],
            NO_LIMIT,
            self._bits,
            n,
            0,
        )
        for position in range(max(int(self._indexed[seat]), anchor - 1), n):
            own.add(position, own.tokens[position + 1 - anchor : position + 1].tolist())
        self._indexed[seat] = max(n, int(self._indexed[seat]))
        if n < anchor:
            return []
        query, owner = own.tokens[:n], int(self._owners[seat])
        half = MOST_FOUND if self.shared is None else MOST_FOUND // 2
        found = self._find(own, query, n - 1, owner, half)
        if self.shared is not None:
            shared = self.shared.index()
            found += self._find(shared, query, shared.count - 1, owner, half)
        return self._choose(found, min(self.rules.most, task.most))

    def _find(
        self, index: _Index, query: NDArray[np.int64], limit: int, owner: int, room: int
    ) -> list[_Occurrence]:
        rules, n = self.rules, len(query)
        low = max(index.floor, index.count - index.mask - 1)
        position = int(index.heads[index.bucket(query[n - rules.anchor :].tolist())]) - 1
        found: list[_Occurrence] = []
        for _ in range(MOST_VISITED):
            if position < low or len(found) == room:
                break
            is_ours = index.owners is None or index.owners[position & index.mask] == owner
            if position < limit and is_ours:
                length = 0
                while (
                    length < min(rules.depth, n)
                    and position - length >= low
                    and index.token(position - length) == query[n - 1 - length]
                ):
                    length += 1
                if length >= rules.anchor:
                    found.append(_Occurrence(index, position, length))
            back = int(index.links[position & index.mask])
            if not back:
                break
            position -= back
        return found

    def _choose(self, found: list[_Occurrence], most: int) -> list[int]:
        lengths = sorted({each.length for each in found}, reverse=True)
        if not lengths:
            return []
        if not self.rules.votes:
            longest = next(each for each in found if each.length == lengths[0])
            return self._follow([longest], self._allowed(longest.length, most))[0]
        best, drafts = 0.0, []
        for length in lengths:
            agreeing = [each for each in found if each.length >= length]
            made, score = self._follow(agreeing, self._allowed(length, most))
            if score > best:
                best, drafts = score, made
        return drafts

    def _allowed(self, length: int, most: int) -> int:
        return min(most, int(self.rules.factor * length))

    def _follow(self, alive: list[_Occurrence], most: int) -> tuple[list[int], float]:
        drafts: list[int] = []
        p, score = 1.0, 0.0
        while len(drafts) < most and alive:
            following = [each.next(drafts) for each in alive]
            votes: dict[int, int] = {}
            for token in following:
                if token >= 0:
                    votes[token] = votes.get(token, 0) + 1
            best = max(votes, key=votes.__getitem__, default=-1)  # of equals, the first
            p *= votes.get(best, 0) / len(alive)
            if best < 0 or p < self.rules.least:
                break
            score += p
            alive = [each for each, token in zip(alive, following, strict=True) if token == best]
            drafts.append(best)
        return drafts, score


class SharedTexts:
    """Past outputs of all requests, each with its owner: a ring."""

    def __init__(self, capacity: int, most_texts: int) -> None:
        assert capacity & (capacity - 1) == 0
        bits = max(6, capacity.bit_length() - 2)
        # Pages of zeros take no memory until they are written.
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._owners = np.zeros(capacity, dtype=np.int64)
        self._links = np.zeros(capacity, dtype=np.int32)
        self._heads = np.zeros(1 << bits, dtype=np.int64)
        self._starts: deque[int] = deque(maxlen=most_texts)
        self._struct = TextIndex(
            tokens=self._tokens.ctypes.data,
            owners=self._owners.ctypes.data,
            links=self._links.ctypes.data,
            heads=self._heads.ctypes.data,
            mask=capacity - 1,
            bucket_bits=bits,
        )

    @property
    def address(self) -> int:
        return ctypes.addressof(self._struct)

    def index(self) -> _Index:
        s = self._struct
        return _Index(
            self._tokens,
            self._owners,
            self._links,
            self._heads,
            s.mask,
            s.bucket_bits,
            s.count,
            s.floor,
        )

    def add(self, text: NDArray[np.int64], owner: int, anchor: int, *, native: bool) -> None:
        text = np.ascontiguousarray(text[-self._struct.mask :])
        if len(self._starts) == self._starts.maxlen:
            self._starts.popleft()
        self._starts.append(self._struct.count)
        self._struct.floor = self._starts[0]
        if native:
            add_text(self._struct, text, owner, anchor)
            return
        tokens = text.tolist()
        index = self.index()
        for i in range(-1, len(tokens)):
            position = self._struct.count
            self._struct.count += 1
            slot = position & index.mask
            self._tokens[slot] = -1 if i < 0 else tokens[i]
            self._owners[slot], self._links[slot] = owner, 0
            if i + 1 >= anchor:
                index.add(position, tokens[i + 1 - anchor : i + 1])


@dataclass(frozen=True, slots=True)
class _Index:
    """text_index in lookup.c."""

    tokens: NDArray[np.int64]
    owners: NDArray[np.int64] | None
    links: NDArray[np.int32]
    heads: NDArray[np.int64]
    mask: int
    bits: int
    count: int
    floor: int

    def token(self, position: int) -> int:
        return int(self.tokens[position & self.mask])

    def bucket(self, tokens: list[int]) -> int:
        value = 0
        for token in tokens:
            value = ((value ^ token) * 0x9E3779B97F4A7C15) % (1 << 64)
        return value >> (64 - self.bits)

    def add(self, position: int, tokens: list[int]) -> None:
        head = self.bucket(tokens)
        back = position + 1 - int(self.heads[head]) if self.heads[head] else 0
        self.links[position & self.mask] = back if back <= self.mask else 0
        self.heads[head] = position + 1


@dataclass(frozen=True, slots=True)
class _Occurrence:
    index: _Index
    at: int
    """The position of the last token that agrees."""
    length: int

    def next(self, drafts: list[int]) -> int:
        position = self.at + 1 + len(drafts)
        if position < self.index.count:
            return self.index.token(position)
        return drafts[position - self.index.count] if self.index.owners is None else -1


def _has_library() -> bool:
    try:
        load_library()
    except BuildError:
        return False
    return True

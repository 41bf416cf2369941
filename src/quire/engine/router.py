"""Chooses a replica for each request, by its prompt and by load. Pure Python, without I/O and clocks.

The router does not see the replicas' caches. It keeps, for each replica, which prefixes it has sent there, as
hashes of the prompt's *chunks* (`_chunks`), each chained to the one before it, and forgets the least
recently used beyond the size of the replica's cache. A wrong guess costs time, never a result.

The rule is one sum: a replica's load, and what the request adds to it. A known prefix is worth what it
saves, however long prompts are, so there is no limit beyond which load counts and prefixes do not. While
the replicas with a prefix have much to do, the prompt is computed once more elsewhere, and then is known
there: a prefix that many requests share comes to be on as many replicas as they need.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)

FINE_TOKENS = 16
COARSE_TOKENS = 64
NUM_FINE = 16
"""The first chunks of a prompt have 16 tokens, the others 64: what a choice costs is mostly the number
of chunks, and the length of a short prefix matters more than that of a long one."""
MAX_CHUNKS = 65_536
"""Most chunks that are remembered of a replica: about 10 MB."""


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """The replica is chosen that has the least of

        load + prefix_weight * (tokens of the prompt that it does not know) + adapter_tokens, if it lacks it

    All are in tokens of prompts to be computed, as loads are."""

    prefix_weight: float = 2.0
    """More than 1: who computes a prefix again also delays those after it, and evicts what others know."""
    min_share: float = 0.25
    """A known prefix counts if it is at least this share of the prompt. Else what all prompts begin with
    would gather them on one replica, whenever there is nothing to do."""
    row_tokens: int = 64
    row_share: float = 1 / 16
    """The load of a request that generates: so many tokens, and this share of its prompt, to which all attend
    that it generates. Without the share, the longer a prefix is, the more rows would a replica get before
    another computes it once: thousands, of 64 tokens each."""
    adapter_tokens: int = 4096
    """What it costs to load a LoRA adapter, and to evict another."""


@dataclass(slots=True)
class _Target:
    """One replica, as far as the router knows it."""

    capacity: int
    """Tokens that its cache holds."""
    max_adapters: int
    load: int = 0
    num_tokens: int = 0
    chunks: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Hash -> tokens of the chunk, the least recently used first. A chunk was always used at least as lately
    as those that continue it, so the prefixes of a known chunk are known."""
    adapters: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Those used last."""

    def num_known(self, hashes: Sequence[int]) -> int:
        """How many chunks of a prompt are known, from its beginning."""
        chunks = self.chunks
        if not hashes or hashes[0] not in chunks:
            return 0
        if hashes[-1] in chunks:
            return len(hashes)
        return bisect_right(hashes, False, key=lambda value: value not in chunks)

    def learn(self, hashes: Sequence[int]) -> None:
        chunks = self.chunks
        for index in range(len(hashes) - 1, -1, -1):
            value = hashes[index]
            if value in chunks:
                chunks.move_to_end(value)
            else:
                size = FINE_TOKENS if index < NUM_FINE else COARSE_TOKENS
                chunks[value] = size
                self.num_tokens += size
        while self.num_tokens > self.capacity or len(chunks) > MAX_CHUNKS:
            self.num_tokens -= chunks.popitem(last=False)[1]


@dataclass(slots=True)
class _Live:
    """A request, from its choice to its end."""

    target: _Target
    load: int
    """What it adds to the target's."""
    row: int
    """What is left of that while it generates."""


class Router(Generic[Name]):
    """Replicas have names, requests have ids: whatever the caller has."""

    def __init__(self, rule: RoutingRule = RoutingRule()) -> None:
        self._rule = rule
        self._targets: dict[Name, _Target] = {}
        self._live: dict[Hashable, _Live] = {}
        self._seed = secrets.randbits(60)
        self._turn = 0
        self._cut(4096)

    # --- replicas ---------------------------------------------------------------------------------

    def add(self, name: Name, *, cache_tokens: int, max_adapters: int = 1) -> None:
        """A replica to choose from. cache_tokens: of its KV cache; 0 if it caches no prefixes.
        max_adapters: that it has in memory."""
        self._targets[name] = _Target(cache_tokens, max_adapters)

    def remove(self, name: Name) -> None:
        """It is chosen no longer. Its requests may still be reported."""
        self._targets.pop(name, None)

    def forget(self) -> None:
        """The caches are empty now."""
        for target in self._targets.values():
            target.chunks.clear()
            target.num_tokens = 0

    def load(self, name: Name) -> int:
        """In tokens; see `RoutingRule`."""
        return self._targets[name].load

    # --- requests ---------------------------------------------------------------------------------

    def choose(
        self,
        request: Hashable,
        tokens: Sequence[int],
        *,
        salt: str | None = None,
        adapter: str | None = None,
        among: Collection[Name] | None = None,
        reads_cache: bool = True,
    ) -> Name:
        """The replica for a request, which then counts as load until `end`.

        tokens: of the prompt. salt, adapter: requests that differ in one of them share no KV.
        among: the replicas that may be chosen; None: all. There must be one.
        """
        names = [name for name in self._targets if among is None or name in among]
        assert names, "no replica"
        self._turn += 1
        first = self._turn % len(names)
        names = names[first:] + names[:first]  # so that equals are chosen in turn
        targets = [self._targets[name] for name in names]
        hashes = self._chunks(tokens, (salt, adapter))
        known = [target.num_known(hashes) if reads_cache else 0 for target in targets]
        chosen = self._pick(targets, known, len(tokens), adapter)
        target = targets[chosen]
        target.learn(hashes)
        if adapter is not None:
            target.adapters[adapter] = None
            target.adapters.move_to_end(adapter)
            if len(target.adapters) > target.max_adapters:
                target.adapters.popitem(last=False)
        missing = len(tokens) - self._cuts[known[chosen]]
        self._start(request, target, missing, len(tokens))
        return names[chosen]

    def _pick(
        self, targets: list[_Target], known: list[int], num_tokens: int, adapter: str | None
    ) -> int:
        rule, cuts = self._rule, self._cuts
        costs: list[float] = []
        for target, count in zip(targets, known, strict=True):
            prefix = cuts[count] if cuts[count] >= rule.min_share * num_tokens else 0
            cost = target.load - rule.prefix_weight * prefix
            if adapter is not None and adapter not in target.adapters:
                cost += rule.adapter_tokens
            costs.append(cost)
        return costs.index(min(costs))

    def follow(self, request: Hashable, name: Name) -> None:
        """A request that shares the prompt of another, or has to be where another is."""
        if name in self._targets:
            self._start(request, self._targets[name], 0, 0)

    def _start(self, request: Hashable, target: _Target, missing: int, context: int) -> None:
        row = self._rule.row_tokens + int(self._rule.row_share * context)
        target.load += missing + row
        self._live[request] = _Live(target, missing + row, row)

    def missing(self, request: Hashable) -> int:
        """Tokens of a chosen request's prompt that its replica has to compute, as far as is known."""
        live = self._live[request]
        return live.load - live.row

    def computed(self, request: Hashable) -> None:
        """Its prompt has been computed; it generates."""
        live = self._live.get(request)
        if live is not None:
            live.target.load -= live.load - live.row
            live.load = live.row

    def end(self, request: Hashable) -> None:
        """It has ended, in any way. Unknown ids are ignored."""
        live = self._live.pop(request, None)
        if live is not None:
            live.target.load -= live.load

    def _chunks(self, tokens: Sequence[int], namespace: Hashable) -> list[int]:
        """The chained hashes of the whole chunks of a prompt. Hashing slices as tuples takes 10 ns a token.
        A collision, even one that a client has made, only leads to a worse choice."""
        if self._cuts[-1] < len(tokens):
            self._cut(2 * len(tokens))
        whole = tuple(tokens)
        value = hash((self._seed, namespace))
        hashes = []
        for part in self._slices[: bisect_right(self._cuts, len(whole)) - 1]:
            value = hash((value, whole[part]))
            hashes.append(value)
        return hashes

    def _cut(self, num_tokens: int) -> None:
        """Say where the chunks of prompts of up to `num_tokens` tokens begin and end."""
        fine = FINE_TOKENS * NUM_FINE
        coarse = range(fine, num_tokens + COARSE_TOKENS, COARSE_TOKENS)
        self._cuts = [*range(0, fine, FINE_TOKENS), *coarse]
        self._slices = [slice(*ends) for ends in pairwise(self._cuts)]

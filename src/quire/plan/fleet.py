"""Several replicas under one virtual clock: who gets which request, and how many there are."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from quire.engine.router import Router
from quire.errors import ConfigError
from quire.plan.histogram import Histogram
from quire.plan.replica import Counts, Life, Replica
from quire.plan.traces import TraceRequest

ROUTINGS = ("prefix", "least-load", "round-robin", "random")


@dataclass(frozen=True, slots=True)
class Autoscale:
    """As many replicas as requests need. More are started at once; fewer are kept only after the need was
    less for `patience` seconds, and a replica that is given up finishes what it has."""

    least: int
    most: int
    target: float
    """Requests of a replica, running or waiting."""
    interval: float = 15.0
    start_delay: float = 60.0
    """Until a new replica serves. It is paid for from the beginning."""
    patience: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"autoscale must be LEAST:MOST with 1 <= LEAST <= MOST, got {self.least}:{self.most}."
            )
        if not self.target > 0 or not self.interval > 0 or self.start_delay < 0:
            raise ConfigError("autoscaling needs a target and an interval greater than 0.")


@dataclass(slots=True)
class Member:
    """A replica of a fleet, and the time for which it is paid."""

    replica: Replica
    since: float
    ready: float
    until: float = math.inf
    is_leaving: bool = False


@dataclass(slots=True)
class Run:
    """What became of a trace."""

    lives: list[Life] = field(default_factory=list)
    """In the order in which requests ended."""
    gaps: Histogram = field(default_factory=Histogram)
    counts: Counts = field(default_factory=Counts)
    end: float = 0.0
    """When the last request ended."""
    elapsed: float = 0.0
    """Seconds, until then or as long as requests came."""
    paid: float = 0.0
    """Seconds of all replicas."""
    num_blocks: int = 0
    """Of one replica."""
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """How many replicas serve, from when on."""


class Fleet:
    def __init__(
        self,
        make: Callable[[], Replica],
        size: int,
        *,
        routing: str = "prefix",
        autoscale: Autoscale | None = None,
        delay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """delay: from a request's arrival until a scheduler has it: HTTP, template, tokenizer."""
        self._delay = delay
        self._make, self._routing, self._autoscale = make, routing, autoscale
        self._members: list[Member] = []
        self._heap: list[tuple[float, int]] = []
        self._router: Router[int] = Router()
        self._ready: list[int] = []
        """The numbers of those that may be chosen."""
        self._dice = random.Random(f"{seed}:routing")
        self._turn = 0
        self._needs: deque[tuple[float, int]] = deque()
        """How many replicas were needed lately."""
        self._run = Run()
        for _ in range(size if autoscale is None else autoscale.least):
            self._start(0.0, 0.0)
        self._open(0.0)

    def run(self, requests: Iterable[TraceRequest], duration: float = 0.0) -> Run:
        """requests: in the order of their times. duration: seconds for which replicas are there at least."""
        ticks = self._autoscale.interval if self._autoscale is not None else math.inf
        tick = ticks
        for number, request in enumerate(requests):
            now = request.time + self._delay
            while tick <= now:
                self._until(tick)
                self._scale(tick)
                tick += ticks
            self._until(now)
            tokens = request.tokens()
            index = self._choose(number, tokens)
            replica = self._members[index].replica
            replica.submit(number, request, tokens, now)
            self._push(index)
        while tick < math.inf and (self._heap or tick <= duration):
            self._until(tick)
            self._scale(tick)
            tick += ticks
        self._until(math.inf)
        return self._finished(duration)

    def _until(self, time: float) -> None:
        """Carry out what is due before. What is due at the same time comes after an arrival, which the step
        that begins then has to know."""
        heap, members = self._heap, self._members
        while heap and heap[0][0] < time:
            due, index = heapq.heappop(heap)
            replica = members[index].replica
            if replica.due == due:  # else it has changed since
                replica.fire()
                self._push(index)

    def _push(self, index: int) -> None:
        due = self._members[index].replica.due
        if due is not None:
            heapq.heappush(self._heap, (due, index))

    def _choose(self, number: int, tokens: list[int]) -> int:
        if self._routing == "round-robin":
            self._turn += 1
            return self._ready[self._turn % len(self._ready)]
        if self._routing == "random":
            return self._dice.choice(self._ready)
        if len(self._ready) == 1:
            return self._ready[0]
        reads_cache = self._routing == "prefix"
        return self._router.choose(number, tokens if reads_cache else [], reads_cache=reads_cache)

    # --- how many ---------------------------------------------------------------------------------

    def _start(self, now: float, ready: float) -> None:
        replica = self._make()
        index = len(self._members)
        self._members.append(Member(replica, now, ready))
        replica.on_first = self._router.computed
        replica.on_end = lambda life: self._ended(index, life)

    def _ended(self, index: int, life: Life) -> None:
        self._router.end(life.number)
        self._run.lives.append(life)
        self._run.end = max(self._run.end, life.last)
        member = self._members[index]
        if member.is_leaving and not member.replica.num_requests:
            member.until = life.last

    def _open(self, now: float) -> None:
        """Let those be chosen whose start is over."""
        ready = [
            index
            for index, member in enumerate(self._members)
            if member.ready <= now and not member.is_leaving
        ]
        for index in set(ready) - set(self._ready):
            kv = self._members[index].replica.scheduler.kv
            cached = kv.num_usable * kv.block_size if kv.enable_prefix_caching else 0
            self._router.add(index, cache_tokens=cached)
        for index in set(self._ready) - set(ready):
            self._router.remove(index)
        if ready != self._ready:
            self._ready = ready
            self._run.sizes.append((now, len(ready)))

    def _scale(self, now: float) -> None:
        rule = self._autoscale
        assert rule is not None
        here = [member for member in self._members if not member.is_leaving]
        total = sum(member.replica.num_requests for member in here)
        needed = min(max(math.ceil(total / rule.target), rule.least), rule.most)
        self._needs.append((now, needed))
        while self._needs[0][0] < now - rule.patience:
            self._needs.popleft()
        for _ in range(needed - len(here)):
            self._start(now, now + rule.start_delay)
        surplus = len(here) - max(count for _, count in self._needs)
        if surplus > 0:
            # Those that do not serve yet, then those with the fewest requests.
            here.sort(key=lambda member: (member.ready <= now, member.replica.num_requests))
            for member in here[:surplus]:
                member.is_leaving = True
                if not member.replica.num_requests:
                    member.until = now
        self._open(now)

    def _finished(self, duration: float) -> Run:
        run = self._run
        run.elapsed = max(run.end, duration)
        for member in self._members:
            replica, counts = member.replica, member.replica.counts
            run.paid += max(0.0, min(member.until, run.elapsed) - member.since)
            run.gaps.merge(replica.gaps)
            run.counts.steps += counts.steps
            run.counts.jumped += counts.jumped
            run.counts.busy += counts.busy
            run.counts.block_seconds += counts.block_seconds
            run.counts.most_blocks = max(run.counts.most_blocks, counts.most_blocks)
            run.num_blocks = replica.scheduler.kv.num_usable
        return run

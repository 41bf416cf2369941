"""What each request did from step to step, read from a `History`: where it waited and why, and its rows.

A record holds only changes. A request that admission has not reached waits behind the one at which it
stopped: the last one that waits for one of `STOPS`. That is no record of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field

from quire.scheduler.decisions import STOPS, Decision, DecisionKind, WaitReason
from quire.scheduler.history import Arrival, End, History, RowRecord, StepRecord

_BEFORE_ARRIVAL = frozenset({WaitReason.GRAMMAR, WaitReason.ADAPTER})


@dataclass(slots=True)
class Waiting:
    """A time without a change of what a queued request waited for."""

    start: float
    end: float
    reason: WaitReason | None
    """None: the record of it is lost."""
    behind: int | None = None
    """For whom it waited: whose prompt it shares, or before whom admission stopped, see `because`."""
    because: WaitReason | None = None
    """With BEHIND: for what that one waited."""
    holder: int | None = None
    """If tokens were lacking: who had most of the step."""
    needed: int = 0
    free: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def lacked(self) -> WaitReason | None:
        return self.because if self.reason is WaitReason.BEHIND else self.reason


@dataclass(frozen=True, slots=True)
class Preemption:
    time: float
    step_id: int
    by: int | None
    needed: int
    """Blocks."""
    free: int
    num_computed: int
    """Of its tokens, that had KV."""


@dataclass(slots=True)
class Life:
    request_id: int
    arrival: Arrival | None
    end: End | None
    waits: list[Waiting] = field(default_factory=list)
    """In order. The first ones, until `admissions[0]`, are its time in the queue."""
    admissions: list[tuple[StepRecord, Decision]] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    rows: list[tuple[StepRecord, RowRecord]] = field(default_factory=list)
    held: list[Decision] = field(default_factory=list)
    """While it ran: why it had no row, or a smaller one than it wanted."""

    @property
    def is_whole(self) -> bool:
        """Whether the record reaches back to its arrival."""
        return self.arrival is not None and (
            not self.rows
            or (
                bool(self.admissions and self.admissions[0][0] is self.rows[0][0])
                # Only a first admission says how much was found in the cache.
                and (not self.admissions or self.admissions[0][1].reason is not None)
            )
        )

    @property
    def last_wait_is_open(self) -> bool:
        return self.end is None and len(self.admissions) <= len(self.preemptions)

    @property
    def tokens(self) -> list[tuple[StepRecord, RowRecord]]:
        """The rows that gave it tokens."""
        return [(s, r) for s, r in self.rows if r.num_accepted and s.done is not None]

    def why_held(self, step_id: int) -> Decision | None:
        """Why it had no row in this step."""
        place = bisect_right(self.held, step_id, key=lambda d: d.step_id)
        waits = (d for d in reversed(self.held[:place]) if d.kind is DecisionKind.WAITS)
        return next(waits, None)


def ids_in(history: History) -> list[int]:
    rows = (row.request_id for step in history.steps for row in step.rows)
    return sorted({*history.arrivals, *history.ends, *rows})


def lives(history: History, request_ids: Collection[int] | None = None) -> dict[int, Life]:
    """Of these requests (None: of all), those of which there is a record."""
    asked = ids_in(history) if request_ids is None else request_ids
    reader = _Reader(history, frozenset(asked))
    for step in history.steps:
        reader.step(step)
    return reader.finish()


class _Reader:
    def __init__(self, history: History, ids: frozenset[int]) -> None:
        self._ids = ids
        self._history, self._arrivals, self._ends = history, history.arrivals, history.ends
        self.found: dict[int, Life] = {}
        self._first = history.steps[0] if history.steps else None
        self._now = history.steps[-1].planned if history.steps else 0.0
        self._for: dict[int, Decision] = {}
        """Of waiting requests: what was recorded last."""
        self._stops: dict[int, Decision] = {}
        """Of those, at whom admission stopped; the last one counts."""
        self._running: set[int] = set()
        self._open: dict[int, Waiting] = {}
        self._situation: object = None
        self._has_victims = False
        self._to_come = sorted(
            (a.time, a.request_id) for a in history.arrivals.values() if a.request_id in ids
        )[::-1]

    def _life(self, request_id: int) -> Life:
        life = self.found.get(request_id)
        if life is None:
            life = self.found[request_id] = Life(
                request_id, self._arrivals.get(request_id), self._ends.get(request_id)
            )
        return life

    def step(self, step: StepRecord) -> None:
        self._arrive(step.planned)
        changed = False
        for decision in step.decisions:
            if decision.request_id is not None and decision.kind is not DecisionKind.FINISHED:
                changed = self._decide(step, decision, decision.request_id) or changed
        stop = step.stopped_at
        if stop not in self._stops:
            stop = next(reversed(self._stops), None)
        situation = (stop, None if stop is None else self._stops[stop].reason, _largest(step))
        if changed or situation != self._situation:
            self._situation = None if self._has_victims else situation
            self._has_victims = False
            for request_id in list(self._open):
                self._look(step, request_id, stop)
        for row in step.rows:
            self._running.add(row.request_id)
            self._open.pop(row.request_id, None)  # it has run since before the record
            if row.request_id in self._ids:
                self._life(row.request_id).rows.append((step, row))
        for decision in step.decisions:
            if decision.kind is DecisionKind.FINISHED and decision.request_id is not None:
                self._end(decision.request_id)

    def _arrive(self, until: float) -> None:
        while self._to_come and self._to_come[-1][0] <= until:
            time, request_id = self._to_come.pop()
            self._life(request_id)
            if request_id in self._open:  # it waited for its grammar or adapter before
                self._close(request_id, time)
                self._leave_queue(request_id)
            arrival = self._arrivals[request_id]
            step = self._history.under_way(arrival.start)
            holder = None if step is None else _largest(step)
            start = arrival.start
            first = self._first
            is_lost = first is not None and first.step_id > 1 and arrival.time < first.planned
            reason = None if is_lost else WaitReason.ARRIVED
            self._open[request_id] = Waiting(start, start, reason, holder=holder)
            self._situation = None
            end = self._ends.get(request_id)
            if end is not None and end.time <= until:  # before another step
                self._close(request_id, end.time)

    def _decide(self, step: StepRecord, decision: Decision, request_id: int) -> bool:
        kind = decision.kind
        mine = request_id in self._ids
        if kind is DecisionKind.WAITS:
            arrival = self._arrivals.get(request_id)
            has_arrived = arrival is not None and arrival.time <= step.planned
            if decision.reason is WaitReason.ARRIVED:
                return False
            if has_arrived and decision.reason in _BEFORE_ARRIVAL:
                return False
            if request_id in self._running:
                if mine:
                    self._life(request_id).held.append(decision)
                return False
            self._for[request_id] = decision
            self._stops.pop(request_id, None)
            if decision.reason in STOPS:
                self._stops[request_id] = decision
            if mine and request_id not in self._open:
                time = step.planned
                self._open[request_id] = Waiting(time, time, None)
        elif kind is DecisionKind.ADMITTED:
            self._leave_queue(request_id)
            self._running.add(request_id)
            if mine:
                self._close(request_id, step.planned)
                self._life(request_id).admissions.append((step, decision))
        elif kind is DecisionKind.PREEMPTED:
            self._running.discard(request_id)
            self._for[request_id] = decision
            self._has_victims = True  # which wait for something else in the next step
            if mine:
                life = self._life(request_id)
                last = life.rows[-1][1] if life.rows else None
                life.preemptions.append(
                    Preemption(
                        step.planned, step.step_id, decision.because_of, decision.needed,
                        decision.free, last.start + last.num_tokens if last is not None else 0,
                    )
                )  # fmt: skip
                self._open[request_id] = Waiting(step.planned, step.planned, None)
        elif kind is DecisionKind.LIMITED and mine:
            self._life(request_id).held.append(decision)
            return False
        return True

    def _look(self, step: StepRecord, request_id: int, stop: int | None) -> None:
        """What an open request waits for in this step."""
        own = self._for.get(request_id)
        if own is not None:
            is_old = own.kind is DecisionKind.PREEMPTED and own.step_id != step.step_id
            if is_old or own.reason is WaitReason.BEHIND:
                own = None
        reason: WaitReason | None = None
        behind = because = None
        if own is not None:
            assert isinstance(own.reason, WaitReason)
            reason, behind, decision = own.reason, own.because_of, own
        elif stop is not None:
            decision = self._stops[stop]
            assert isinstance(decision.reason, WaitReason)
            reason, behind, because = WaitReason.BEHIND, stop, decision.reason
        else:
            decision = None
        holder = None
        if (because or reason) in (WaitReason.BUDGET, WaitReason.TARGET):
            holder = _largest(step)
        was = self._open[request_id]
        now = (reason, behind, because, holder)
        if (was.reason, was.behind, was.because, was.holder) == now and was.start < step.planned:
            return
        needed, free = (decision.needed, decision.free) if decision is not None else (0, 0)
        self._close(request_id, step.planned)
        self._open[request_id] = Waiting(
            step.planned, step.planned, reason, behind, because, holder, needed, free
        )

    def _leave_queue(self, request_id: int) -> None:
        self._for.pop(request_id, None)
        self._stops.pop(request_id, None)

    def _close(self, request_id: int, time: float) -> None:
        waiting = self._open.pop(request_id, None)
        if waiting is not None and time > waiting.start:
            waiting.end = time
            self._life(request_id).waits.append(waiting)

    def _end(self, request_id: int) -> None:
        self._leave_queue(request_id)
        self._running.discard(request_id)
        end = self._ends.get(request_id)
        if request_id in self._open and end is not None:
            self._close(request_id, end.time)
        self._open.pop(request_id, None)

    def finish(self) -> dict[int, Life]:
        self._arrive(float("inf"))
        for request_id in list(self._open):
            self._life(request_id)
            end = self._ends.get(request_id)
            self._close(request_id, self._now if end is None else end.time)
        return self.found


def _largest(step: StepRecord) -> int | None:
    """Whose row has the most tokens."""
    row = max(step.rows, key=lambda row: row.num_tokens, default=None)
    return None if row is None else row.request_id

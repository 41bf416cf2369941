"""Reads what `scheduler/record.py` has written."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quire.errors import ConfigError
from quire.messages import FinishReason
from quire.prefix_report import MissReason
from quire.scheduler import record as codes
from quire.scheduler.decisions import Decision, DecisionKind, Reason, WaitReason
from quire.scheduler.history import Arrival, End, History, RowRecord, StepRecord
from quire.scheduler.record import DIGEST_BYTES, MAGIC, Added, Header, Running, State, digest

MOST_EXPANSION, LEAST_ROOM = 64, 1 << 24
"""All segments together have at most so many times the bytes of the record, and LEAST_ROOM more. Times alone,
which are in every step, are not compressed so far."""
Item = Any
"""A list whose first entry is the code, or a number, or None: see `scheduler/record.py`."""


class RecordError(ConfigError):
    """What was read is no record, or a damaged one, or one that cannot be replayed."""


@dataclass(frozen=True, slots=True)
class Segment:
    state: State
    items: list[Item]
    times: Sequence[float]
    chain: bytes
    """With all segments before it."""


@dataclass(frozen=True, slots=True)
class Record:
    header: Header
    live: list[tuple[Added, bytes]]
    """Requests that had not ended, with the hashes of their blocks."""
    segments: list[Segment]

    @property
    def is_whole(self) -> bool:
        return not self.header.num_dropped


def open_record(data: bytes) -> Record:
    """Raises `RecordError`, also if the chain does not hold."""
    if not data.startswith(MAGIC):
        raise RecordError("This is not a record of decisions (or one of another version).")
    start = len(MAGIC) + DIGEST_BYTES
    body = data[start:]
    if digest(body) != data[len(MAGIC) : start]:
        raise RecordError("The record is damaged: its hash is wrong.")
    try:
        parts = msgspec.msgpack.decode(body)
        header = msgspec.convert(parts[0], Header)
        live = [(Added(*added), hashes) for added, hashes in parts[1]]
        chain, segments, room = header.chain, [], LEAST_ROOM + MOST_EXPANSION * len(data)
        for number, (expected, packed) in enumerate(parts[2]):
            unpacker = zlib.decompressobj()
            body = unpacker.decompress(packed, room)
            room -= len(body)
            if not unpacker.eof or room <= 0:
                raise RecordError(f"The record is damaged: segment {number} has no end.")
            chain = digest(chain + body)
            if chain != expected:
                raise RecordError(f"The record is damaged: the hash of segment {number} is wrong.")
            state, items, raw = msgspec.msgpack.decode(body)
            times = array("d")
            times.frombytes(raw)
            segments.append(Segment(_state(state), items, times, chain))
    except (
        msgspec.MsgspecError,
        zlib.error,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RecordError(f"The record is damaged: {error}") from error
    if not segments:
        raise RecordError("The record is damaged: it has no segments.")
    return Record(header, live, segments)


def _state(fields: list[Any]) -> State:
    state = State(*fields)
    waits = [(i, WaitReason(reason), other) for i, reason, other in state.waits]
    return state._replace(running=[Running(*each) for each in state.running], waits=waits)


def read(data: bytes) -> History:
    """Raises `RecordError`, also for a whole record that no recorder would write."""
    record = open_record(data)
    try:
        return history_of(record)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"The record contradicts itself: {type(error).__name__}: {error}"
        ) from error


def history_of(record: Record) -> History:
    reader = _Reader(record)
    for segment in record.segments:
        for item in segment.items:
            reader.take(item, segment.times)
    return reader.history()


@dataclass(slots=True)
class _Row:
    request_id: int
    start: int
    num_tokens: int
    samples: int
    num_drafts: int = 0
    num_accepted: int = 0

    def frozen(self) -> RowRecord:
        return RowRecord(
            self.request_id, self.start, self.num_tokens, self.samples, self.num_drafts,
            self.num_accepted,
        )  # fmt: skip


@dataclass(slots=True)
class _Step:
    """A step that is being read."""

    step_id: int
    planned: float
    quantum: int
    free: int
    budget: int
    decisions: list[Decision]
    rows: list[_Row] = field(default_factory=list)
    drafts: dict[int, int] = field(default_factory=dict)
    done: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    stopped_at: int | None = None
    is_planned: bool = False


class _Reader:
    def __init__(self, record: Record) -> None:
        first = record.segments[0].state
        self._record = record
        self._step_id, self._num_waiting = first.step_id, first.num_waiting
        self._ids, self._counts = list(first.ids), list(first.counts)
        self._computed = {each.request_id: each.num_computed_tokens for each in first.running}
        """Of running requests."""
        self._total = {each.request_id: each.num_tokens for each in first.running}
        """Known and pending tokens."""
        self._idle = {each.request_id for each in first.running if not each.generates}
        self._unseen = first.num_in_flight
        """Results to come of steps before the first."""
        self._stopped_at = first.stopped_at
        self._num_admitted = 0
        """In the step that is being read."""
        self._in_flight: deque[_Step] = deque()
        self._steps: list[_Step] = []
        self._early = [
            Decision(first.step_id, request_id, DecisionKind.WAITS, reason, other)
            for request_id, reason, other in first.waits
        ]
        """Decisions before the first step that is in the record."""
        self._now = 0.0
        self._rows: dict[int, _Row] = {}
        """Of the step whose result is being read."""
        self._arrivals: dict[int, Arrival] = {}
        self._ends: dict[int, End] = {}
        for added, _ in record.live:
            self._arrive(added, added.arrival_time)

    # --- calls ------------------------------------------------------------------------------------

    def take(self, item: Item, times: Sequence[float]) -> None:
        if item is None:
            self._planned()
            return
        if isinstance(item, int):
            self._result(times[item] if item < len(times) else 0.0)
            return
        code = item[0]
        if code == codes.STEP:
            self._step(item, times)
        elif code == codes.ADD:
            self._add(Added(*item), times)
        elif code == codes.ROWS:
            self._edit(item)
        elif code == codes.STOPPED:
            self._stopped_at = item[1]
        elif code == codes.DRAFTS:
            self._drafts(item)
        elif code == codes.LEARNED:
            self._learned(item)
        elif code in _CALLS:
            self._planned()
        if code in _DECISIONS:
            decision = _DECISIONS[code](self._step_id, item)
            self._report(decision)
            self._follow(decision, item)

    def _report(self, decision: Decision) -> None:
        (self._steps[-1].decisions if self._steps else self._early).append(decision)

    def _add(self, added: Added, times: Sequence[float]) -> None:
        self._planned()
        self._now = times[added.time]
        self._arrive(added, self._now)
        self._num_waiting += 1
        self._report(
            Decision(self._step_id, added.request_id, DecisionKind.WAITS, WaitReason.ARRIVED)
        )

    def _arrive(self, added: Added, now: float) -> None:
        request_id = added.request_id
        if not added.generates:
            self._idle.add(request_id)
        self._arrivals[request_id] = Arrival(
            request_id,
            now,
            added.num_prompt_tokens,
            added.max_tokens,
            added.tenant,
            sent=added.arrival_time,
        )

    def _step(self, item: Item, times: Sequence[float]) -> None:
        self._planned()
        _, quantum, free, budget, index = item
        self._step_id += 1
        # The first that was read in this call; the one before is that of the last result.
        planned = self._now = times[index if index < len(times) else max(0, index - 1)]
        step = _Step(self._step_id, planned, quantum, free, budget, self._early)
        self._early = []
        step.decisions.append(
            Decision(
                self._step_id, None, DecisionKind.STEP, needed=quantum, free=free, budget=budget
            )
        )
        self._steps.append(step)

    def _edit(self, item: Item) -> None:
        _, gone, new, others = item
        if gone is not None:
            left = set(gone)
            new = [each for each in self._ids if each not in left] + new
        self._ids, self._counts = new, [1] * len(new)
        for index in range(0, len(others), 2):
            self._counts[others[index]] = others[index + 1]

    def _drafts(self, item: Item) -> None:
        for index in range(1, len(item), 3):
            request_id, proposed, verified = item[index : index + 3]
            self._steps[-1].drafts[request_id] = verified
            kind = DecisionKind.DRAFTS
            self._report(
                Decision(self._step_id, request_id, kind, needed=proposed, budget=verified)
            )

    def _follow(self, decision: Decision, item: Item) -> None:
        """What a decision changes."""
        request_id = decision.request_id
        if request_id is None:
            return
        if decision.kind is DecisionKind.ADMITTED:
            self._num_waiting -= 1
            self._num_admitted += 1
            start = item[-1]
            self._computed[request_id] = start
            self._total[request_id] = start + decision.needed
        elif decision.kind is DecisionKind.PREEMPTED:
            del self._computed[request_id]
            self._num_waiting += 1
        elif decision.kind is DecisionKind.FINISHED:
            if self._computed.pop(request_id, None) is None:
                self._num_waiting -= 1
            self._total.pop(request_id, None)
            assert isinstance(decision.reason, FinishReason)
            self._ends[request_id] = End(request_id, self._now, decision.reason, item[3], item[4])

    # --- rows -------------------------------------------------------------------------------------

    def _planned(self) -> None:
        """The next call begins, so the last step is complete, if that was planned by the last call."""
        if not self._steps or self._steps[-1].is_planned:
            return
        step = self._steps[-1]
        step.is_planned = True
        rows = list(zip(self._ids, self._counts, strict=True))
        first = len(rows) - self._num_admitted  # in the plan they are first
        self._num_admitted = 0
        for request_id, count in rows[first:] + rows[:first]:
            if request_id not in self._computed:
                continue  # the engine has failed while it planned
            start, drafts = self._computed[request_id], step.drafts.get(request_id, 0)
            reach = start + count - drafts
            samples = 0
            if reach == self._total[request_id] and request_id not in self._idle:
                samples = 1 + drafts
            step.rows.append(_Row(request_id, start, count, samples, drafts))
            self._computed[request_id] = start + count
            self._total[request_id] += samples
        step.num_running, step.num_waiting = len(self._computed), self._num_waiting
        step.stopped_at = self._stopped_at
        if step.rows or not (self._in_flight or self._unseen):
            self._in_flight.append(step)

    def _result(self, now: float) -> None:
        self._planned()
        self._now = now
        if self._unseen:
            self._unseen -= 1
            self._rows = {}
            return
        step = self._in_flight.popleft()
        step.done = now
        self._rows = {row.request_id: row for row in step.rows if row.request_id in self._total}
        for row in self._rows.values():
            row.num_accepted = min(1, row.samples)

    def _learned(self, item: Item) -> None:
        size = codes.LEARNED_FIELDS
        for index in range(1, len(item), size):
            request_id, samples, count, accepted, right, _, _ = item[index : index + size]
            row = self._rows.get(request_id)
            if row is not None:
                row.num_accepted = accepted
            if request_id not in self._total:
                continue  # it has ended with this
            self._total[request_id] += count - samples
            if samples > 1 and request_id in self._computed:
                self._computed[request_id] -= samples - 1 - min(right, count - 1)

    def history(self) -> History:
        self._planned()
        steps = [
            StepRecord(
                step_id=step.step_id, planned=step.planned, done=step.done, budget=step.budget,
                num_free=step.free, num_blocks=self._record.header.num_blocks - 1,
                num_running=step.num_running, num_waiting=step.num_waiting,
                rows=tuple(row.frozen() for row in step.rows), decisions=tuple(step.decisions),
                stopped_at=step.stopped_at,
            )
            for step in self._steps
        ]  # fmt: skip
        return History(tuple(steps), self._arrivals, self._ends, self._record.header.epoch)


def _name(tenant: int | None) -> str | None:
    return None if tenant is None else str(tenant)


def _admitted(step_id: int, item: Item) -> Decision:
    _, request_id, reason, needed, free, budget, tenant, counter, _ = item
    return Decision(
        step_id, request_id, DecisionKind.ADMITTED, None if reason is None else MissReason(reason),
        needed=needed, free=free, budget=budget, tenant=_name(tenant), counter=counter,
    )  # fmt: skip


def _waits(step_id: int, item: Item) -> Decision:
    _, request_id, reason, because_of, needed, free, budget, gain, cost, tenant, counter = item
    return Decision(
        step_id, request_id, DecisionKind.WAITS, WaitReason(reason), because_of, needed, free,
        budget, gain, cost, _name(tenant), counter,
    )  # fmt: skip


def _of(kind: DecisionKind, reason: Reason | None, *names: str) -> Any:
    """A reader of records whose entries have these names."""

    def read_item(step_id: int, item: Item) -> Decision:
        fields = dict(zip(names, item[1:], strict=False))
        request_id = fields.pop("request_id", None)
        fields.setdefault("reason", reason)
        return Decision(step_id, request_id, kind, **fields)

    return read_item


def _note(step_id: int, item: Item) -> Decision:
    return Decision(step_id, item[1], DecisionKind.WAITS, WaitReason(item[2]))


def _finished(step_id: int, item: Item) -> Decision:
    return Decision(step_id, item[1], DecisionKind.FINISHED, FinishReason(item[2]))


_DECISIONS = {
    codes.ADMITTED: _admitted,
    codes.WAITS: _waits,
    codes.NOTE: _note,
    codes.FINISHED: _finished,
    codes.LIMITED: _of(DecisionKind.LIMITED, None, "request_id", "needed", "budget"),
    codes.PREEMPTED: _of(
        DecisionKind.PREEMPTED, WaitReason.PREEMPTED, "request_id", "because_of", "needed", "free",
        "cost",
    ),
    codes.LATENCY: _of(DecisionKind.LATENCY, None, "needed", "budget", "gain", "cost"),
}  # fmt: skip


def calls_of(items: list[Item]) -> Iterator[list[Item]]:
    """Each call with what it has led to."""
    call: list[Item] = []
    for item in items:
        if call and (item is None or isinstance(item, int) or item[0] in _CALLS):
            yield call
            call = []
        call.append(item)
    if call:
        yield call


_CALLS = frozenset({codes.STEP, codes.NOTE, codes.ADD, codes.ABORT, codes.RESET})

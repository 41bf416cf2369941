"""A scheduler in simulated time, of which a `History` is kept as the record would keep it, and beside it the
truth: what each waiting request waited for in each step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from quire.kvcache import KVCacheManager
from quire.messages import FinishReason, RequestUpdate, SampledRow, StepPlan, StepResult
from quire.placement import Placement
from quire.scheduler import Decision, DecisionKind, Scheduler, SchedulerLimits, Wait
from quire.scheduler.decisions import DecisionLog
from quire.scheduler.history import Arrival, End, History, RowRecord, StepRecord
from quire.scheduler.record import Recorder
from quire.scheduler.record_reader import read
from tests.scheduler.requests import add_request


class _Log(DecisionLog):
    def __init__(self) -> None:
        super().__init__()
        self.new: list[Decision] = []

    def keep(self, decision: Decision) -> None:
        self.new.append(decision)


@dataclass
class Observed:
    """A step takes `base` seconds and `token` for each of its tokens."""

    num_blocks: int = 1000
    seats: int = 8
    budget: int = 32
    block_size: int = 4
    longest: int = 400
    depth: int = 1
    base: float = 0.010
    token: float = 0.001
    limits: dict[str, Any] = field(default_factory=dict)
    is_raw: bool = False
    """Whether reasons that do not change are repeated."""
    now: float = 100.0
    truth: list[tuple[float, dict[int, Wait]]] = field(default_factory=list)
    """When a step was planned, and what the waiting requests waited for."""
    steps: list[StepRecord] = field(default_factory=list)
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = _Log()
        self.record = Recorder(clock=lambda: self.now)
        bounds = {"watermark_blocks": 0, **self.limits}
        drafts = bounds.get("max_drafts", 0)
        self.scheduler = Scheduler(
            SchedulerLimits(self.seats, self.budget, self.longest, **bounds),
            KVCacheManager(self.num_blocks, self.block_size, enable_prefix_caching=True),
            clock=lambda: self.now,
            record=self.record,
            observe=self.log.keep if self.is_raw else self.log,
        )
        self.drafts = drafts
        self._in_flight: deque[tuple[StepPlan, int, float]] = deque()
        self._free_at = self.now

    def add(self, request_id: int, prompt: int, max_tokens: int = 4, **fields: Any) -> None:
        """The prompt is of one token, that of `first` (of no other request by default)."""
        first = fields.pop("first", 1000 + request_id)
        fields = {"arrival_time": self.now, **fields}
        message = add_request(request_id, [first] * prompt, max_tokens=max_tokens, **fields)
        sent = fields["arrival_time"]
        self.arrivals[request_id] = Arrival(request_id, self.now, prompt, max_tokens, sent=sent)
        self.scheduler.add_request(message)

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        self._ended(self.scheduler.abort([request_id], reason))
        if self.steps:
            self._take_decisions()

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step()

    def drain(self) -> None:
        while self.scheduler.has_work or self._in_flight:
            self.step()

    def step(self) -> None:
        planned, free = self.now, self.scheduler.kv.num_free
        plan = self.scheduler.schedule()
        waits = {r.request_id: self.scheduler.why_waits(r) for r in self.scheduler.waiting}
        self.truth.append((planned, waits))
        rows = tuple(
            RowRecord(
                row.request_id, row.start, row.num_tokens, row.samples, len(row.draft_token_ids)
            )
            for row in plan.rows
        )
        self.steps.append(
            StepRecord(
                plan.step_id, planned, None, self.budget, free, self.num_blocks - 1,
                len(self.scheduler.running), len(self.scheduler.waiting), rows, (),
            )
        )  # fmt: skip
        self._take_decisions()
        if plan.rows or not self._in_flight:
            seconds = self.base + self.token * plan.num_tokens
            self._free_at = max(self._free_at, self.now) + seconds
            self._in_flight.append((plan, len(self.steps) - 1, self._free_at))
            self.now += 0.0005
        if not plan.rows or len(self._in_flight) == self.depth:
            self._take_result()

    def _take_result(self) -> None:
        plan, index, done = self._in_flight.popleft()
        self.now = max(self.now, done)
        sampled = []
        for row in plan.rows:
            if row.samples:
                right = row.draft_token_ids[: len(row.draft_token_ids) // 2]
                drafts = (7,) * row.num_drafts
                sampled.append(
                    SampledRow(
                        request_id=row.request_id,
                        token_ids=[*right, 5],
                        draft_token_ids=drafts,
                    )
                )
        result = StepResult(step_id=plan.step_id, sampled=sampled)
        before = {i: r.num_output_tokens for i, r in self.scheduler.requests.items()}
        updates = self.scheduler.update(plan, result)
        new = {update.request_id: len(update.new_token_ids) for update in updates}
        self._ended(updates, before)
        rows = tuple(
            replace(row, num_accepted=new.get(row.request_id, 0)) for row in self.steps[index].rows
        )
        self.steps[index] = replace(self.steps[index], done=self.now, rows=rows)
        self._take_decisions()

    def _ended(self, updates: list[RequestUpdate], before: dict[int, int] | None = None) -> None:
        for update in updates:
            if update.finish_reason is not None:
                given = sum(
                    row.num_accepted
                    for step in self.steps
                    for row in step.rows
                    if row.request_id == update.request_id
                )
                self.ends[update.request_id] = End(
                    update.request_id,
                    self.now,
                    update.finish_reason,
                    given + len(update.new_token_ids),
                    update.num_preemptions,
                )

    def _take_decisions(self) -> None:
        """Those made before the first step belong to it."""
        if self.steps:
            last = self.steps[-1]
            self.steps[-1] = replace(last, decisions=last.decisions + tuple(self.log.new))
            self.log.new.clear()

    def history(self) -> History:
        return History(tuple(self.steps), dict(self.arrivals), dict(self.ends), epoch=1.7e9)

    def recorded(self) -> History:
        """The same, from the record's bytes."""
        return read(self.record.dump())

    def kinds(self, kind: DecisionKind) -> list[Decision]:
        return [d for step in self.steps for d in step.decisions if d.kind is kind]


def place(priority: int = 0, tenant: str = "") -> Placement:
    return Placement(priority=priority, tenant=tenant)

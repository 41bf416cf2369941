"""The scheduler's decisions with their reasons: records to explain, replay or simulate a run."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from quire.messages import FinishReason, StepPlan
from quire.prefix_report import MissReason

logger = logging.getLogger(__name__)


class WaitReason(str, Enum):
    """The first test that a request failed in a step, so that it has no row in it."""

    ARRIVED = "arrived after the last step"
    BLOCKS = "no free blocks"
    SEAT = "no sequence slot"
    BUDGET = "no token budget"
    BEHIND = "behind one that does not fit"
    """Admission is in order: it stopped at a request before this one."""
    PREEMPTED = "preempted in this step"
    """A step that preempts admits no request, so not its victims either."""
    PREFIX = "its prefix is being computed"
    """A running request before it computes the prefix."""
    FORK = "its fork's leader computes the prompt"
    TOKEN = "its last token is pending"
    """A plan in flight samples the token."""
    SHARE = "the next plan has room for it"
    """The rows are divided among the plans in flight."""
    TARGET = "the step has no time for it"
    """By --itl-target: `scheduler/latency.py`."""
    COST = "it would be preempted too soon"
    """What it computes until then is expected to take less time than to restore what it loses."""
    LOAD = "its KV is being loaded"
    """From a store outside the cache."""
    GRAMMAR = "its grammar is being compiled"
    ADAPTER = "its adapter is not in memory"
    PLACE = "no place for its adapter"
    """Running requests use as many adapters as may be used at once; or a request before it has waited long
    for a place, and running requests' adapters get no new requests until it has one."""

    @property
    def label(self) -> str:
        """The label in metrics, which is vLLM's: `deferred` if the scheduler chose to wait, else
        `capacity`."""
        return "deferred" if self in _DEFERRED else "capacity"


_DEFERRED = frozenset(
    {
        WaitReason.PREFIX, WaitReason.FORK, WaitReason.TOKEN, WaitReason.LOAD, WaitReason.GRAMMAR,
        WaitReason.ADAPTER, WaitReason.PLACE,
    }
)  # fmt: skip


STOPS = frozenset(
    {
        WaitReason.BLOCKS, WaitReason.SEAT, WaitReason.BUDGET, WaitReason.COST, WaitReason.TARGET,
    }
)  # fmt: skip
"""Admission stops at a request that waits for one of these."""


class Standing(NamedTuple):
    """Whose turn it is under the fair policy, see `Decision`."""

    tenant: str | None = None
    counter: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a request has no row in a step. Numbers that do not apply are 0."""

    reason: WaitReason
    because_of: int | None = None
    """The request for which it waits."""
    needed: int = 0
    """The blocks (no free blocks) or tokens (no token budget) that its admission needs in total."""
    free: int = 0
    """Blocks that were free for it: without those promised to running requests, and the watermark."""
    budget: int = 0
    """Tokens of the step's budget that were left."""
    gain: float = 0.0
    cost: float = 0.0
    """Expected seconds, see `scheduler/worth.py`."""


Reason = WaitReason | FinishReason | MissReason


class DecisionKind(str, Enum):
    STEP = "step"
    """A step begins with `budget` tokens and `free` blocks; each running request gets at least `needed`
    tokens."""
    ADMITTED = "admitted"
    """`needed`: tokens that the cache did not hold. `budget`: tokens it computes in this step. `free`: blocks
    left. At the first admission, the reason is why no more of the prompt was found."""
    WAITS = "waits"
    """See `Wait`. A waiting request without a record in a step was not considered: it is behind the one
    whose record stopped admission. If it was considered in the step before, there is one, without
    `because_of`."""
    LIMITED = "limited"
    """A running request wanted `needed` tokens and got `budget`."""
    PREEMPTED = "preempted"
    """`because_of` needed `needed` blocks, and `free` were free. `cost`: of restoring its KV."""
    LATENCY = "latency"
    """Prompts that want `needed` tokens get `budget`, with which the step is expected to take `cost` seconds;
    its target is `gain`."""
    DRAFTS = "drafts"
    """A row verifies `budget` of `needed` proposed drafts."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Decision:
    step_id: int
    request_id: int | None
    """None for a record about the whole step."""
    kind: DecisionKind
    reason: Reason | None = None
    because_of: int | None = None
    needed: int = 0
    free: int = 0
    budget: int = 0
    gain: float = 0.0
    cost: float = 0.0
    tenant: str | None = None
    counter: float = 0.0
    """Under the fair policy, of an admission and of the request at which it stopped: whose turn it was, and
    what the tenant has been charged then, divided by its weight."""

    def __str__(self) -> str:
        """On one line, without what does not apply."""
        numbers = {
            "because_of": self.because_of, "needed": self.needed, "free": self.free,
            "budget": self.budget, "gain": self.gain, "cost": self.cost,
        }  # fmt: skip
        parts = [f"{name} {number:.4g}" for name, number in numbers.items() if number]
        reason = [] if self.reason is None else [self.reason.value]
        who = "" if self.request_id is None else f"request {self.request_id} "
        return f"step {self.step_id}: {who}{self.kind.value}: {', '.join(reason + parts)}"


Observer = Callable[[Decision], None]


class Requested(Protocol):
    @property
    def request_id(self) -> int: ...


class Ring(Protocol):
    """`scheduler/record.py`, as far as it is told of decisions."""

    def step(self, step_id: int, quantum: int, free: int, budget: int) -> None: ...
    def latency(self, needed: int, budget: int, target: float, predicted: float) -> None: ...
    def admitted(
        self, request_id: int, miss: MissReason | None, numbers: tuple[int, int, int], who: Standing
    ) -> None:
        """numbers: needed, free, budget."""

    def waits_outside(self, request_id: int, reason: WaitReason) -> None:
        """It is not in the scheduler yet."""

    def preempted(self, request_id: int, wait: Wait) -> None: ...
    def drafts(self, request_id: int, proposed: int, verified: int) -> None: ...
    def finished(self, request_id: int, reason: FinishReason) -> None: ...
    def rows(
        self,
        running: Sequence[Requested],
        wanted: Sequence[int],
        waits: Mapping[int, Wait],
        stopped_at: int | None,
        plan: StepPlan,
    ) -> None: ...


class Reporter:
    """Reports decisions to an observer and to the record, if there are any."""

    def __init__(
        self,
        observe: Observer | None,
        standing: Callable[[int], Standing] = lambda _: Standing(),
        record: Ring | None = None,
    ) -> None:
        """standing: of a request that is queued or runs."""
        self._observe, self._standing, self._record = observe, standing, record
        self._step_id = 0
        self._considered: set[int] = set()
        """In the last step, of the requests without a row."""

    def step(self, step_id: int, quantum: int, free: int, budget: int) -> None:
        self._step_id = step_id
        if self._record is not None:
            self._record.step(step_id, quantum, free, budget)
        if self._observe is not None:
            self._report(None, DecisionKind.STEP, needed=quantum, free=free, budget=budget)

    def latency(self, needed: int, budget: int, target: float, predicted: float) -> None:
        if self._record is not None:
            self._record.latency(needed, budget, target, predicted)
        if self._observe is not None:
            kind = DecisionKind.LATENCY
            self._observe(
                Decision(
                    self._step_id,
                    None,
                    kind,
                    needed=needed,
                    budget=budget,
                    gain=target,
                    cost=predicted,
                )
            )

    def admitted(
        self, request_id: int, miss: MissReason | None, needed: int, free: int, budget: int
    ) -> None:
        """miss: None unless it is the first admission."""
        if self._record is not None:
            numbers = (needed, free, budget)
            self._record.admitted(request_id, miss, numbers, self._standing(request_id))
        self._report(request_id, DecisionKind.ADMITTED, miss, None, needed, free, budget)

    def arrived(self, request_id: int) -> None:
        self._waits(request_id, Wait(WaitReason.ARRIVED))

    def waits_outside(self, request_id: int, reason: WaitReason) -> None:
        """It is not in the scheduler yet."""
        if self._record is not None:
            self._record.waits_outside(request_id, reason)
        self._waits(request_id, Wait(reason))

    def preempted(self, request_id: int, wait: Wait) -> None:
        if self._record is not None:
            self._record.preempted(request_id, wait)
        self._waits(request_id, wait, DecisionKind.PREEMPTED)

    def _waits(self, request_id: int, wait: Wait, kind: DecisionKind = DecisionKind.WAITS) -> None:
        if self._observe is not None:
            fields = dataclasses.asdict(wait)
            if wait.reason in STOPS:
                fields |= self._standing(request_id)._asdict()
            self._observe(Decision(self._step_id, request_id, kind, **fields))

    def finished(self, request_id: int, reason: FinishReason) -> None:
        self._considered.discard(request_id)
        if self._record is not None:
            self._record.finished(request_id, reason)
        self._report(request_id, DecisionKind.FINISHED, reason)

    def drafts(self, request_id: int, proposed: int, verified: int) -> None:
        if self._record is not None:
            self._record.drafts(request_id, proposed, verified)
        self._report(request_id, DecisionKind.DRAFTS, needed=proposed, budget=verified)

    def rows(
        self,
        running: Sequence[Requested],
        wanted: Sequence[int],
        waits: Mapping[int, Wait],
        stopped_at: int | None,
        plan: StepPlan,
    ) -> None:
        """A step is planned. Report the requests without a row, or with a smaller one than they wanted, and
        those that admission did not reach this time, but in the step before.

        running: before the step; wanted: by each of them, the number of tokens. stopped_at: the request at
        which admission stopped.
        """
        if self._record is None and self._observe is None:
            return
        if passed := self._considered - waits.keys():
            passed.difference_update(request.request_id for request in running)
            passed.difference_update(admitted.request_id for admitted in plan.admitted)
        self._considered = set(waits)
        if passed:
            waits = {**waits, **dict.fromkeys(sorted(passed), Wait(WaitReason.BEHIND))}
        if self._record is not None:
            self._record.rows(running, wanted, waits, stopped_at, plan)
        if self._observe is None:
            return
        for request_id, wait in waits.items():
            if wait.reason is not WaitReason.PREEMPTED:  # reported before
                self._waits(request_id, wait)
        given = {row.request_id: row.num_tokens - len(row.draft_token_ids) for row in plan.rows}
        for request_id, count in zip((each.request_id for each in running), wanted, strict=True):
            if request_id in waits:
                continue
            if not count:
                self._waits(request_id, Wait(WaitReason.TOKEN))
            elif given[request_id] < count:
                self._report(
                    request_id, DecisionKind.LIMITED, needed=count, budget=given[request_id]
                )

    def _report(
        self,
        request_id: int | None,
        kind: DecisionKind,
        reason: Reason | None = None,
        because_of: int | None = None,
        needed: int = 0,
        free: int = 0,
        budget: int = 0,
    ) -> None:
        if self._observe is not None:
            standing = Standing()
            if kind is DecisionKind.ADMITTED and request_id is not None:
                standing = self._standing(request_id)
            decision = Decision(
                self._step_id, request_id, kind, reason, because_of, needed, free, budget,
                tenant=standing.tenant, counter=standing.counter,
            )  # fmt: skip
            self._observe(decision)


class DecisionLog:
    """An observer that keeps the latest decisions. While a request waits for the same thing step after step,
    only the first record is kept."""

    def __init__(self, most: int = 65_536) -> None:
        self._ring: deque[Decision] = deque(maxlen=most)
        self._waits: dict[int, tuple[Reason | None, int | None]] = {}

    def __call__(self, decision: Decision) -> None:
        request_id = decision.request_id
        if request_id is not None:
            if decision.kind is DecisionKind.WAITS:
                wait = (decision.reason, decision.because_of)
                if self._waits.get(request_id) == wait:
                    return
                self._waits[request_id] = wait
            elif decision.kind is not DecisionKind.LIMITED:
                self._waits.pop(request_id, None)
        self.keep(decision)

    def keep(self, decision: Decision) -> None:
        self._ring.append(decision)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._ring)

    def of(self, request_id: int) -> list[Decision]:
        """The decisions about the request, and those that were made because of it."""
        return [d for d in self._ring if request_id in (d.request_id, d.because_of)]


_IN_MOST_STEPS = frozenset(
    {DecisionKind.STEP, DecisionKind.LIMITED, DecisionKind.LATENCY, DecisionKind.DRAFTS}
)


class DebugLog(DecisionLog):
    """Writes them to the log at debug level, but for those that most steps have."""

    def keep(self, decision: Decision) -> None:
        if decision.kind not in _IN_MOST_STEPS:
            logger.debug("%s", decision)


def debug_log() -> DebugLog | None:
    """None if nobody reads it."""
    return DebugLog() if logger.isEnabledFor(logging.DEBUG) else None

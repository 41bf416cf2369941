"""One replica under virtual time: the engine's own scheduler and cache, and a step time instead of a device.

The order of events is that of `EngineCore.step`: messages, a plan, its launch, and the oldest result once as
many plans are in flight as the executor may have. So blocks, rows and decisions are the engine's, and only
how long a step takes is modelled.

**Jumps.** While a batch only generates, nothing is decided: a stretch of steps is carried out at once, with
one step time after the other, so that the times are the same to the last bit. A stretch ends before a
request does, before blocks run out, and at an arrival. Within it, blocks are allocated request by request
and not step by step. That changes which number a block has, and nothing else: nothing is freed and nothing
is looked up, so the same contents are evicted. Always stepped are a target for the time of a step, sliding
windows, and a queue whose head may be admitted by the clock or by measured times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from quire.decoding import Decoding
from quire.messages import AddRequest, SampledRow, StepPlan, StepResult
from quire.plan.cost import StepTime
from quire.plan.histogram import Histogram
from quire.plan.traces import TraceRequest
from quire.scheduler import Scheduler, WaitReason
from quire.scheduler.cost_model import Work, work_of

END_TOKEN = 0
OWN_TOKENS = 1 << 30
"""What request i generates is the token `OWN_TOKENS + i`: nobody else has it."""
MOST_STEPS = 128
"""Of a stretch; an arrival may end it, and what was computed of the rest is lost."""
_STUCK = frozenset({WaitReason.SEAT, WaitReason.BLOCKS})
"""Reasons to wait that nothing changes before a request ends."""


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Life:
    """A request from its arrival to its end, in virtual seconds."""

    number: int
    request: TraceRequest
    made: int = 0
    """Output tokens."""
    admitted: float = 0.0
    first: float = -1.0
    """When its first token was there."""
    last: float = 0.0
    """And its latest one; in the end, its last one."""
    cached: int = 0
    """Tokens of its prompt that the cache had."""
    preemptions: int = 0
    turn: int = -1
    """The number of the result that had its latest token."""


@dataclass(slots=True)
class Counts:
    """What a replica did."""

    steps: int = 0
    jumped: int = 0
    """Of these steps, those that were not planned one by one."""
    busy: float = 0.0
    """Seconds of its steps."""
    block_seconds: float = 0.0
    """Blocks that requests held, times seconds. In a stretch, as if they were taken evenly."""
    most_blocks: int = 0


class _Stretch:
    """Steps to come in which all running requests generate."""

    __slots__ = ("done", "results", "seconds")

    def __init__(self) -> None:
        self.results: list[float] = []
        """When the result of each is taken."""
        self.done: list[float] = []
        """When the device is through with the plan that each launches."""
        self.seconds: list[float] = []
        """Of each of those plans."""

    def cut(self, until: float) -> None:
        """Keep the steps up to the first whose result is there at `until` or later."""
        count = bisect_left(self.results, until) + 1
        del self.results[count:], self.done[count:], self.seconds[count:]


class Replica:
    """`due` is when something happens next, None while it is idle; `fire` carries it out."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        step: StepTime,
        *,
        max_in_flight: int = 1,
        host_seconds: float = 0.0,
        jumps: bool = True,
        exact_ends: bool = False,
    ) -> None:
        """clock: the scheduler's. host_seconds: from a result to the next plan, if `step` does not count it.
        With two plans in flight the device does not wait for it.
        exact_ends: the scheduler knows how long outputs become (`ignore_eos`); else they end by a token."""
        limits = scheduler.limits
        self.scheduler, self.clock, self._step = scheduler, clock, step
        self._depth, self._host, self._exact_ends = max_in_flight, host_seconds, exact_ends
        self._jumps = (
            jumps and limits.stages == 1 and not limits.itl_target and not limits.max_drafts
            and not scheduler.kv.has_windows and scheduler.loading is None
        )  # fmt: skip
        self._fixed_order = limits.policy != "fair"
        self.due: float | None = None
        self.counts = Counts()
        self.gaps = Histogram()
        """Seconds between tokens of a request."""
        self.on_first: Callable[[int], None] = lambda number: None
        self.on_end: Callable[[Life], None] = lambda life: None
        self.on_plan: Callable[[StepPlan], None] | None = None
        self._lives: dict[int, Life] = {}
        self._inbox: list[AddRequest] = []
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._is_awaited = False
        self._device_free = 0.0
        self._stretch: _Stretch | None = None
        self._turn = 0
        """The number of the latest result."""
        self._step_id = 0
        """Of its plan."""
        self._has_ended = False
        """Whether a request ended with it."""
        self._blocks, self._blocks_since = 0, 0.0

    @property
    def num_requests(self) -> int:
        return len(self._lives)

    def submit(self, number: int, request: TraceRequest, tokens: list[int], now: float) -> None:
        """The scheduler gets a request now. Everything due before has been carried out."""
        most = request.output_len
        if not self._exact_ends:
            most = self.scheduler.limits.max_model_len - len(tokens)
        message = AddRequest(
            request_id=number,
            prompt_token_ids=tokens,
            decoding=Decoding(max_tokens=most, end_token_ids=frozenset({END_TOKEN})),
            arrival_time=request.time,
        )
        self._lives[number] = Life(number, request)
        self._inbox.append(message)
        if self.due is None:
            self.due = now
        elif self._stretch is not None:
            self._stretch.cut(now)
            self.due = self._stretch.results[-1]

    def fire(self) -> None:
        """Carry out what is due, and decide what is due next."""
        assert self.due is not None
        now = self.clock.now = self.due
        if self._stretch is not None:
            self._advance(self._stretch)
        elif self._is_awaited:
            self._take(now)
        self.due = None
        if self._stretch is not None or self._is_awaited:
            self._stretch, self._is_awaited = None, False
            now += self._host
        self._begin(now)

    # --- one step ---------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self.clock.now = now
        if self._inbox:
            for message in self._inbox:
                self.scheduler.add_request(message)
            self._inbox.clear()
        elif self._jumps and self._plan_stretch(now):
            return
        if not self._in_flight and not self.scheduler.has_work:
            self._hold(now)
            return
        plan = self.scheduler.schedule()
        self._hold(now)
        if self.on_plan is not None:
            self.on_plan(plan)
        if plan.rows or not self._in_flight:
            seconds = self._step.seconds(work_of(plan.rows)) if plan.rows else 0.0
            self._device_free = max(now, self._device_free) + seconds
            self._in_flight.append((plan, self._device_free))
            self.counts.steps += bool(plan.rows)
            self.counts.busy += seconds
        self.due = now
        if not plan.rows or len(self._in_flight) == self._depth:
            self._is_awaited = True
            self.due = max(now, self._in_flight[0][1])

    def _take(self, now: float) -> None:
        """Apply the oldest result."""
        plan, _ = self._in_flight.popleft()
        self._turn += 1
        self._step_id, self._has_ended = plan.step_id, False
        lives, sampled = self._lives, []
        for row in plan.rows:
            if row.samples and (life := lives.get(row.request_id)) is not None:
                life.made += 1
                ended = life.made >= life.request.output_len
                token = END_TOKEN if ended else OWN_TOKENS + life.number
                sampled.append(SampledRow(request_id=life.number, token_ids=[token]))
        gaps: dict[float, int] = {}
        result = StepResult(step_id=plan.step_id, sampled=sampled)
        for update in self.scheduler.update(plan, result):
            life = lives[update.request_id]
            if life.first < 0.0:
                assert update.times is not None and update.prefix is not None
                life.first, life.admitted = now, update.times.scheduled
                life.cached = update.prefix.device
                self.on_first(life.number)
            else:
                gap = now - life.last
                gaps[gap] = gaps.get(gap, 0) + 1
            life.last, life.turn = now, self._turn
            if update.finish_reason is not None:
                self._has_ended = True
                life.preemptions = update.num_preemptions
                del lives[life.number]
                self.on_end(life)
        for gap, count in gaps.items():
            self.gaps.add(gap, count)

    def _hold(self, now: float) -> None:
        """Count the blocks held until now, and from now on."""
        self.counts.block_seconds += self._blocks * (now - self._blocks_since)
        self._blocks, self._blocks_since = self.scheduler.kv.num_referenced, now
        self.counts.most_blocks = max(self.counts.most_blocks, self._blocks)

    # --- many steps -------------------------------------------------------------------------------

    def _plan_stretch(self, now: float) -> bool:
        """Find the steps to come in which nothing is decided. False: the next step has to be planned."""
        running, lives, depth = self.scheduler.running, self._lives, self._depth
        if not len(running) or len(self._in_flight) != depth - 1 or self._is_decided():
            return False
        if any(len(plan.rows) != len(running) for plan, _ in self._in_flight):
            return False
        left, contexts = MOST_STEPS + 1, 0
        for request in running:
            life = lives[request.request_id]
            if life.turn != self._turn or request.num_pending_tokens != depth - 1:
                return False
            left = min(left, life.request.output_len - life.made)
            contexts += request.num_computed_tokens
        count = self._with_blocks(left - 1)
        if count < 2:
            return False
        self._stretch = self._times(now, count, len(running), contexts)
        self.due = self._stretch.results[-1]
        return True

    def _is_decided(self) -> bool:
        """Whether the next plan may admit a request."""
        head = self.scheduler.waiting.first()
        if head is None:
            return False
        if self._has_ended or not self._fixed_order:
            return True
        return self.scheduler.why_waits(head).reason not in _STUCK

    def _with_blocks(self, count: int) -> int:
        """How many of `count` steps the free blocks last for."""
        kv, size = self.scheduler.kv, self.scheduler.kv.block_size
        rooms = [
            kv.num_blocks_of(request.request_id) * size - request.num_computed_tokens
            for request in self.scheduler.running
        ]

        def fits(steps: int) -> bool:
            missing = sum((steps - room - 1) // size + 1 for room in rooms if room < steps)
            return missing <= kv.num_free

        if count < 2 or fits(count):
            return count
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _times(self, now: float, count: int, rows: int, contexts: int) -> _Stretch:
        """The sums that single steps make, in their order."""
        stretch, free = _Stretch(), self._device_free
        waited = deque(done for _, done in self._in_flight)
        for index in range(count):
            seconds = self._step.seconds(Work(rows, contexts + index * rows))
            free = max(now, free) + seconds
            waited.append(free)
            now = max(now, waited.popleft())
            stretch.results.append(now)
            stretch.done.append(free)
            stretch.seconds.append(seconds)
            now += self._host
        return stretch

    def _advance(self, stretch: _Stretch) -> None:
        """Carry out the steps of a stretch."""
        scheduler, kv, results = self.scheduler, self.scheduler.kv, stretch.results
        count, rows, previous = len(results), len(scheduler.running), 0.0
        self._turn += count
        for request in scheduler.running:
            life = self._lives[request.request_id]
            previous, life.last, life.turn = life.last, results[-1], self._turn
            life.made += count
            request.token_ids.extend([OWN_TOKENS + life.number] * count)
            request.num_computed_tokens += count
            growth = kv.grow(request.request_id, request.num_computed_tokens)
            assert growth is not None, "_with_blocks has counted them"
            kv.register(
                request.request_id, request.token_ids, request.num_computed_tokens, self._step_id
            )
        contexts = sum(request.num_computed_tokens for request in scheduler.running)
        first = contexts - rows * (count + self._depth - 1)
        scheduler.costs.repeat(rows, first, scheduler.rates.repeat(results))
        for at in results:
            self.gaps.add(at - previous, rows)
            previous = at
        for plan, _ in self._in_flight:
            for row in plan.rows:
                row.start += count
        launched = [*(done for _, done in self._in_flight), *stretch.done][count:]
        plans = (plan for plan, _ in self._in_flight)
        self._in_flight = deque(zip(plans, launched, strict=True))
        self._device_free, self._has_ended = stretch.done[-1], False
        counts, blocks, since = self.counts, self._blocks, self._blocks_since
        self._hold(results[-1])
        counts.block_seconds += (self._blocks - blocks) / 2 * (results[-1] - since)
        counts.steps += count
        counts.jumped += count
        for seconds in stretch.seconds:
            counts.busy += seconds

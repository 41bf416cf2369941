"""The engine core: scheduler and executor, step after step."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable

from quire.decoding import GrammarSpec
from quire.engine.inspection import core_state
from quire.engine.pending import PendingRequests, failed
from quire.engine.residence import AdapterMemory
from quire.errors import EngineError, EngineSleepingError
from quire.executor.base import Executor, StepFuture
from quire.kvcache import ChangeStream
from quire.messages import (
    AbortRequests,
    AddAdapter,
    AddRequest,
    Answer,
    Control,
    ControlAction,
    CoreInput,
    CoreOutput,
    DropAdapter,
    FinishReason,
    Inspect,
    LoadAdapter,
    Ping,
    Pong,
    ReadRecord,
    RequestUpdate,
    ResetPrefixCache,
    Sleep,
    StepOutputs,
    StepPlan,
)
from quire.messages.failures import failure_of
from quire.scheduler import Scheduler
from quire.scheduler.deadlines import Deadlines
from quire.structured.store import GrammarStore

logger = logging.getLogger(__name__)

ANY_JSON = GrammarSpec("json_schema", '{"type":"object"}')


class EngineCore:
    """The step loop, without I/O: `handle` takes messages, `step` returns outputs."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        grammars: GrammarStore | None = None,
        max_adapters: int = 0,
        events: ChangeStream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_adapters: the most that are in memory."""
        self.scheduler = scheduler
        self.executor = executor
        self._clock = clock
        self._events = events
        self._in_flight: deque[tuple[StepPlan, StepFuture]] = deque()
        self._grammars = grammars
        self._sleep_level = 0
        self._adapters = AdapterMemory(executor, max_adapters)
        self._deadlines = Deadlines()
        self._pending = PendingRequests(grammars, self._adapters, scheduler.waiting.waiting_key)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self._pending.has_work or self.scheduler.has_work

    def step(self) -> StepOutputs:
        """One iteration of continuous batching: launch a plan, and take the oldest result once as many plans
        as the executor may have are in flight, or no request can run before there is a result."""
        updates = self._admit_ready()
        if self._deadlines:
            updates += self._end(self._deadlines.passed(self._clock()), FinishReason.EXPIRED)
        plan = self.scheduler.schedule()
        if plan.rows or not self._in_flight:
            self._in_flight.append((plan, self.executor.execute(plan)))
        if not plan.rows or len(self._in_flight) == self.executor.max_in_flight:
            launched, future = self._in_flight.popleft()
            updates += self.scheduler.update(launched, future.result())
        return self._outputs(updates)

    def prepare(self) -> bool:
        """Called when there is no work: see `Executor.prepare`."""
        if self.has_work or self._sleep_level:
            return False
        if self._grammars is not None:
            self._grammars.prepare(ANY_JSON)  # reads the vocabulary, with the first grammar
        return self.executor.prepare()

    def handle(self, message: CoreInput) -> CoreOutput | None:
        """Handle one message. A request that cannot be accepted fails alone."""
        if isinstance(message, AddRequest):
            try:
                self._add(message)
            except Exception as error:
                return self._outputs([failed(message, error)])
        elif isinstance(message, AbortRequests):
            return self._outputs(self._end(message.request_ids, FinishReason.ABORT))
        elif isinstance(message, Ping):
            return Pong(message.nonce, self._clock())
        elif isinstance(message, Control):
            return self._control(message)
        elif isinstance(message, AddAdapter):
            self._adapters.add(message.key, message.path)
        elif isinstance(message, DropAdapter):
            self._adapters.drop(message.key)
        return None

    def _control(self, message: Control) -> Answer | None:
        """Carry out one call. An error is returned to its caller; the engine continues."""
        if isinstance(message.action, Sleep):
            self._drain()  # outside the try: an error in a step must end the engine
        failure, records, states = None, [], []
        try:
            if isinstance(message.action, ReadRecord):
                records = [r.dump() for r in (self.scheduler.record,) if r is not None]
            elif isinstance(message.action, LoadAdapter):
                self._pending.load(message, message.action)
                return None  # answered with the outputs of a later step
            elif isinstance(message.action, Inspect):
                states = [
                    core_state(self.scheduler, self._pending, self._sleep_level, self._clock())
                ]
            else:
                self._carry_out(message.action)
        except Exception as error:
            what = f"The engine failed on {type(message.action).__name__}"
            logger.exception("%s", what)
            failure = failure_of(error, what)
        return Answer(message.id, self._sleep_level, failure, records, states)

    def _drain(self) -> None:
        """Drain: no request is left; finish the steps in flight and send pending releases."""
        while self.has_work and not (self.scheduler.requests or self._pending):
            self.step()

    def _carry_out(self, action: ControlAction) -> None:
        if isinstance(action, ResetPrefixCache):
            self.scheduler.reset_prefix_cache()
        else:
            self._set_sleep_level(action.level if isinstance(action, Sleep) else 0)
        self._publish()

    def _set_sleep_level(self, level: int) -> None:
        """level 0: awake. If the executor raises, its state is unchanged."""
        if level == self._sleep_level:
            return
        if self.has_work:
            raise EngineError("The engine cannot sleep while requests run.")
        if self._sleep_level:
            self.executor.wake_up()
            self._sleep_level = 0
        if level:
            self.scheduler.reset_prefix_cache()
            self._drain()
            self.executor.sleep(level)
            self._adapters.clear()
            self._sleep_level = level

    def close(self) -> None:
        if self.scheduler.loading is not None:
            with contextlib.suppress(Exception):  # of an executor that has failed
                self._drain()  # saves what the last requests left
        self.executor.close()
        if self._events is not None:
            self._events.close()

    def _add(self, message: AddRequest) -> None:
        if self._sleep_level:
            raise EngineSleepingError("The engine sleeps.")
        if message.deadline is not None:
            self._deadlines.add(message.request_id, message.deadline)
        if (reason := self._pending.add(message)) is None:
            self.scheduler.add_request(message)
        else:
            self.scheduler.report.waits_outside(message.request_id, reason)

    def _admit_ready(self) -> list[RequestUpdate]:
        """Add the requests whose grammar and adapter are there now. Returns the end of those that failed."""
        if not self._pending.has_work:
            return []
        ready, ends = self._pending.take(wait=not (self._in_flight or self.scheduler.has_work))
        for message in ready:
            self.scheduler.add_request(message)
        return ends

    def _end(self, request_ids: list[int], reason: FinishReason) -> list[RequestUpdate]:
        return self._pending.abort(request_ids, reason) + self.scheduler.abort(request_ids, reason)

    def _outputs(self, updates: list[RequestUpdate]) -> StepOutputs:
        for update in updates:
            if update.finish_reason is not None:
                self._adapters.end(update.request_id)
                self._deadlines.ended(update.request_id)
        self._publish()
        stats = self.scheduler.take_stats()
        answers = self._pending.report(stats, self.scheduler.adapters.in_use)
        return StepOutputs(updates=updates, stats=stats, timestamp=self._clock(), answers=answers)

    def _publish(self) -> None:
        """Publish what has changed in the cache by the steps that are done."""
        if self._events is not None:
            self._events.flush([plan.step_id for plan, _ in self._in_flight])

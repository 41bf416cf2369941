"""The engine core: scheduler and executor, step after step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from quire.decoding import GrammarSpec
from quire.engine.failures import failure_of
from quire.errors import EngineError, EngineSleepingError
from quire.executor.base import Executor, StepFuture
from quire.messages import (
    AbortRequests,
    AddRequest,
    Answer,
    Control,
    ControlAction,
    CoreInput,
    CoreOutput,
    FinishReason,
    Ping,
    Pong,
    RequestUpdate,
    ResetPrefixCache,
    Sleep,
    StepOutputs,
    StepPlan,
)
from quire.scheduler import Scheduler, Wait, WaitReason
from quire.structured.base import GrammarError
from quire.structured.store import GrammarStore

logger = logging.getLogger(__name__)

COMPILE_WAIT_SECONDS = 0.005
ANY_JSON = GrammarSpec("json_schema", '{"type":"object"}')


class EngineCore:
    """The step loop, without I/O: `handle` takes messages, `step` returns outputs."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        grammars: GrammarStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, StepFuture]] = deque()
        self._grammars = grammars
        self._sleep_level = 0
        self._compiling: dict[int, AddRequest] = {}
        """Requests whose grammar is being compiled while steps run. They are not in the scheduler yet."""

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._compiling) or self.scheduler.has_work

    def step(self) -> StepOutputs:
        """One iteration of continuous batching: launch a plan, then take the result of the oldest one in
        flight, which is the same one unless the executor overlaps. A plan without rows overlaps with
        nothing, so then no plan stays in flight."""
        updates = self._admit_compiled()
        plan = self.scheduler.schedule()
        self._in_flight.append((plan, self.executor.execute(plan)))
        may_stay = self.executor.max_in_flight - 1 if plan.rows else 0
        while len(self._in_flight) > may_stay:
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
                return self._outputs([_failed(message, error)])
        elif isinstance(message, AbortRequests):
            return self._outputs(self._abort(message.request_ids))
        elif isinstance(message, Ping):
            return Pong(message.nonce, self._clock())
        elif isinstance(message, Control):
            return self._control(message)
        return None

    def _control(self, message: Control) -> Answer:
        """Carry out one call. An error is returned to its caller; the engine continues."""
        if isinstance(message.action, Sleep):
            self._drain()  # outside the try: an error in a step must end the engine
        failure = None
        try:
            self._carry_out(message.action)
        except Exception as error:
            what = f"The engine failed on {type(message.action).__name__}"
            logger.exception("%s", what)
            failure = failure_of(error, what)
        return Answer(message.id, self._sleep_level, failure)

    def _drain(self) -> None:
        """Drain: no request is left; finish the steps in flight and send pending releases."""
        while self.has_work and not (self.scheduler.requests or self._compiling):
            self.step()

    def _carry_out(self, action: ControlAction) -> None:
        if isinstance(action, ResetPrefixCache):
            self.scheduler.reset_prefix_cache()
        else:
            self._set_sleep_level(action.level if isinstance(action, Sleep) else 0)

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
            self.executor.sleep(level)
            self._sleep_level = level

    def close(self) -> None:
        self.executor.close()

    def _add(self, message: AddRequest) -> None:
        if self._sleep_level:
            raise EngineSleepingError("The engine sleeps.")
        grammar = message.decoding.grammar
        if grammar is None:
            self.scheduler.add_request(message)
            return
        if self._grammars is None:
            raise ValueError("this engine has no grammars")
        self._grammars.prepare(grammar)
        self._compiling[message.request_id] = message
        self.scheduler.report.waits(message.request_id, Wait(WaitReason.GRAMMAR))

    def _admit_compiled(self) -> list[RequestUpdate]:
        """Add the requests whose grammar has been compiled; without other work, wait a short time for one."""
        if not self._compiling:
            return []
        assert self._grammars is not None
        if not self._in_flight and not self.scheduler.has_work:
            self._grammars.wait(COMPILE_WAIT_SECONDS)
        updates = []
        for message in list(self._compiling.values()):
            spec = message.decoding.grammar
            assert spec is not None
            grammar = self._grammars.ready(spec)
            if grammar is None:
                continue
            del self._compiling[message.request_id]
            if isinstance(grammar, GrammarError):
                updates.append(_failed(message, grammar))
            else:
                self.scheduler.add_request(message)
        return updates

    def _abort(self, request_ids: list[int]) -> list[RequestUpdate]:
        compiling = [i for i in request_ids if self._compiling.pop(i, None) is not None]
        updates = [RequestUpdate(request_id=i, finish_reason=FinishReason.ABORT) for i in compiling]
        return updates + self.scheduler.abort(request_ids)

    def _outputs(self, updates: list[RequestUpdate]) -> StepOutputs:
        stats = self.scheduler.take_stats()
        stats.num_waiting += len(self._compiling)
        stats.waiting_by_reason[WaitReason.GRAMMAR.label] += len(self._compiling)
        return StepOutputs(updates=updates, stats=stats, timestamp=self._clock())


def _failed(message: AddRequest, error: Exception) -> RequestUpdate:
    return RequestUpdate(
        request_id=message.request_id,
        finish_reason=FinishReason.ERROR,
        error=failure_of(error, "The engine could not accept the request").message,
    )

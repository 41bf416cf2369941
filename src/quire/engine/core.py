"""The engine core: scheduler and executor, step after step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from quire.executor.base import Executor, StepFuture
from quire.messages import (
    AbortRequests,
    AddRequest,
    CoreInput,
    CoreOutput,
    FinishReason,
    Ping,
    Pong,
    RequestUpdate,
    ResetPrefixCache,
    StepOutputs,
    StepPlan,
)
from quire.scheduler import Scheduler


class EngineCore:
    """Plans, executes, learns. Sans I/O: messages in by `handle`, outputs out of `step`."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, StepFuture]] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> StepOutputs:
        """One iteration of continuous batching: launch a plan, then learn from the oldest one in flight,
        which is the same one unless the executor overlaps. Without rows there is nothing to overlap with,
        so nothing stays in flight."""
        plan = self.scheduler.schedule()
        self._in_flight.append((plan, self.executor.execute(plan)))
        may_stay = self.executor.max_in_flight - 1 if plan.rows else 0
        updates: list[RequestUpdate] = []
        while len(self._in_flight) > may_stay:
            launched, future = self._in_flight.popleft()
            updates += self.scheduler.update(launched, future.result())
        return self._outputs(updates)

    def prepare(self) -> bool:
        """For a loop that finds nothing to do: see `Executor.prepare`."""
        return not self.has_work and self.executor.prepare()

    def handle(self, message: CoreInput) -> CoreOutput | None:
        """Take in one message. A request that cannot be taken in fails alone."""
        if isinstance(message, AddRequest):
            try:
                self.scheduler.add_request(message)
            except Exception as error:
                return self._outputs([_failed(message, error)])
        elif isinstance(message, AbortRequests):
            return self._outputs(self.scheduler.abort(message.request_ids))
        elif isinstance(message, Ping):
            return Pong(message.nonce, self._clock())
        elif isinstance(message, ResetPrefixCache):
            self.scheduler.kv.pool.reset_cache()
        return None

    def close(self) -> None:
        self.executor.close()

    def _outputs(self, updates: list[RequestUpdate]) -> StepOutputs:
        return StepOutputs(
            updates=updates, stats=self.scheduler.take_stats(), timestamp=self._clock()
        )


def _failed(message: AddRequest, error: Exception) -> RequestUpdate:
    return RequestUpdate(
        request_id=message.request_id,
        finish_reason=FinishReason.ERROR,
        error=f"The engine could not accept the request ({type(error).__name__}).",
    )

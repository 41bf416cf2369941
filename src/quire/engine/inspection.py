"""What an engine core shows of itself to operators."""

from __future__ import annotations

import time

from quire.engine.pending import PendingRequests
from quire.messages.state import CoreState
from quire.scheduler import Scheduler
from quire.scheduler.state import scheduler_state


def core_state(
    scheduler: Scheduler, pending: PendingRequests, sleep_level: int, now: float
) -> CoreState:
    """Between two steps. now: of the core's clock."""
    begun = time.perf_counter()
    state = scheduler_state(scheduler, now)
    preparing = pending.states(now)
    state.requests += preparing
    state.num_waiting += len(preparing)
    state.adapters = pending.adapters.in_memory
    state.sleep_level = sleep_level
    state.cost_seconds = time.perf_counter() - begun
    return state

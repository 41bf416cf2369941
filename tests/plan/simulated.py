"""What the tests of the simulator share."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kvcache import KVCacheManager
from quire.plan.replica import Clock, Replica
from quire.plan.traces import TraceRequest
from quire.scheduler import Observer, Scheduler, SchedulerLimits
from quire.scheduler.cost_model import Work


@dataclass(frozen=True)
class Linear:
    """A `StepTime` of five numbers."""

    constant: float = 0.004
    row: float = 1e-4
    context: float = 1e-7
    token: float = 2e-5
    is_bound: bool = False

    def seconds(self, work: Work) -> float:
        contexts = work.contexts + work.prompt_contexts
        return (
            self.constant
            + self.row * work.rows
            + self.token * work.prompt_tokens
            + self.context * contexts
        )


def limits(**changes: object) -> SchedulerLimits:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}
    return SchedulerLimits(**(values | changes))  # type: ignore[arg-type]


def make_replica(
    limits: SchedulerLimits,
    num_blocks: int,
    *,
    block_size: int = 16,
    caching: bool = True,
    observe: Observer | None = None,
    step: Linear = Linear(),
    **options: object,
) -> Replica:
    clock = Clock()
    kv = KVCacheManager(num_blocks, block_size, enable_prefix_caching=caching)
    scheduler = Scheduler(limits, kv, clock=clock, observe=observe)
    return Replica(scheduler, clock, step, **options)  # type: ignore[arg-type]


def drive(replica: Replica, requests: list[TraceRequest]) -> list[object]:
    """Carry out a trace. Returns the ends of the requests, in their order."""
    ended: list[object] = []
    replica.on_end = ended.append  # type: ignore[assignment]
    for number, request in enumerate(requests):
        while replica.due is not None and replica.due < request.time:
            replica.fire()
        replica.submit(number, request, request.tokens(), request.time)
    while replica.due is not None:
        replica.fire()
    return ended

"""The state of a scheduler, for operators who look at it: read between two steps. No decision depends on
whether it was read."""

from __future__ import annotations

from itertools import islice

from quire.kvcache.block_map import block_map, num_shared_blocks
from quire.messages import AddRequest
from quire.messages.state import CoreState, RequestState, WaitState
from quire.scheduler.decisions import Wait, WaitReason
from quire.scheduler.request import Request, RequestStatus
from quire.scheduler.scheduler import Scheduler

MOST_RUNNING = 1024
MOST_WAITING = 128
"""Requests that are shown, the first ones: a queue of thousands is not read by a person."""

_TEXTS = {reason: (reason.value, reason.label) for reason in WaitReason}


def scheduler_state(scheduler: Scheduler, now: float) -> CoreState:
    """now: of the scheduler's clock."""
    running = list(islice(scheduler.running, MOST_RUNNING))
    waiting = list(islice(scheduler.waiting, MOST_WAITING))
    standings: dict[str, float] = {}
    for request in running + waiting:
        standing = scheduler.waiting.standing(request)
        if standing.tenant is not None:
            standings[standing.tenant] = max(standings.get(standing.tenant, 0.0), standing.counter)
    return CoreState(
        cost_seconds=0.0,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        requests=[_of(request, scheduler, now) for request in running + waiting],
        blocks=block_map(scheduler.kv, [request.request_id for request in running]),
        standings=standings,
    )


def _of(request: Request, scheduler: Scheduler, now: float) -> RequestState:
    blocks = shared = 0
    wait = None
    if request.status is RequestStatus.RUNNING:
        blocks = scheduler.kv.num_blocks_of(request.request_id)
        shared = num_shared_blocks(scheduler.kv, request.request_id)
    else:
        wait = _wait(scheduler.why_waits(request))
    admitted = request.scheduled_time or now
    return RequestState(
        request_id=request.request_id,
        status=request.status.value,
        tenant=request.placement.tenant,
        adapter=request.placement.adapter,
        priority=request.placement.priority,
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=0 if request.prefix is None else request.prefix.cached,
        output_tokens=request.num_output_tokens,
        computed_tokens=request.num_computed_tokens,
        max_tokens=request.decoding.max_tokens,
        blocks=blocks,
        shared_blocks=shared,
        seconds=now - request.queued_time,
        queued_seconds=admitted - request.queued_time,
        preemptions=request.num_preemptions,
        wait=wait,
    )


def preparing(message: AddRequest, reason: WaitReason, now: float) -> RequestState:
    """A request that is on its way to the scheduler."""
    waited = max(0.0, now - message.arrival_time)
    return RequestState(
        request_id=message.request_id,
        status="preparing",
        tenant=message.placement.tenant,
        adapter=message.placement.adapter,
        priority=message.placement.priority,
        prompt_tokens=len(message.prompt_token_ids),
        output_tokens=len(message.output_token_ids),
        max_tokens=message.decoding.max_tokens,
        seconds=waited,
        queued_seconds=waited,
        wait=_wait(Wait(reason)),
    )


def _wait(wait: Wait) -> WaitState:
    reason, label = _TEXTS[wait.reason]
    return WaitState(
        reason=reason,
        label=label,
        because_of=wait.because_of,
        needed=wait.needed,
        free=wait.free,
    )

"""What always holds between two steps, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.scheduler.request import RequestStatus

if TYPE_CHECKING:
    from quire.scheduler.scheduler import Scheduler


def check_invariants(scheduler: Scheduler) -> None:
    """Check that queues, requests and blocks are consistent. Raises AssertionError."""
    waiting, running, kv = scheduler.waiting, scheduler.running, scheduler.kv
    queued = [r.request_id for r in waiting] + [r.request_id for r in running]
    assert sorted(queued) == sorted(scheduler.requests), "a request is lost or queued twice"
    keys = [request.sort_key for request in running]
    assert keys == sorted(keys)
    waiting.check_invariants()
    assert len(running) <= scheduler.limits.max_num_seqs
    for request in running:
        assert request.status is RequestStatus.RUNNING
        assert request.num_computed_tokens < request.num_tokens or not request.generates
        assert kv.num_blocks_of(request.request_id) * kv.block_size >= request.num_computed_tokens
    for request in waiting:
        assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert not request.num_computed_tokens and not request.draft_token_ids
    kv.check_invariants(
        scheduler.loading.transfers.blocks() if scheduler.loading is not None else ()
    )
    assert set(kv.tables) == {request.request_id for request in running}

"""The core's paragraph with no model beneath it: plan, execute, learn."""

from __future__ import annotations

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, AddRequest, FinishReason, Ping, Pong, StepOutputs
from quire.sampling_params import SamplingParams
from quire.scheduler import Scheduler, SchedulerLimits


def make_core() -> tuple[EngineCore, MockExecutor]:
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32)
    executor = MockExecutor(lambda request_id, index: 100 * request_id + index)
    scheduler = Scheduler(limits, KVCacheManager(20, 4, enable_prefix_caching=True))
    return EngineCore(scheduler, executor, clock=lambda: 5.0), executor


def add(request_id: int, prompt: list[int], max_tokens: int = 2) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return AddRequest(
        request_id=request_id, prompt_token_ids=prompt, params=params, seed=0, max_tokens=max_tokens
    )


def test_steps_carry_a_request_from_chunks_to_its_end() -> None:
    core, executor = make_core()
    assert core.handle(add(1, list(range(10)))) is None
    steps = [core.step() for _ in range(3)]
    assert [[row.num_tokens for row in plan.rows] for plan in executor.plans] == [[8], [2], [1]]
    assert [[u.new_token_ids for u in step.updates] for step in steps] == [[], [[110]], [[111]]]
    assert steps[-1].updates[0].finish_reason is FinishReason.LENGTH
    assert all(step.stats is not None and step.timestamp == 5.0 for step in steps)
    assert core.has_work, "the executor has not heard of the end yet"
    core.step()
    assert executor.plans[-1].released == [1] and not core.has_work


def test_messages_between_steps() -> None:
    core, _ = make_core()
    core.handle(add(1, [1, 2]))
    refused = core.handle(add(1, [1, 2]))
    assert isinstance(refused, StepOutputs)
    assert refused.updates[0].finish_reason is FinishReason.ERROR
    aborted = core.handle(AbortRequests([1, 99]))
    assert isinstance(aborted, StepOutputs)
    assert [u.finish_reason for u in aborted.updates] == [FinishReason.ABORT]
    assert core.handle(Ping(3)) == Pong(3, 5.0)
    assert not core.has_work

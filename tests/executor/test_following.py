"""A rank that does not sample has the seats and the KV of the one that does, whatever is scheduled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.engine.llm import LLM
from quire.messages import AbortRequests, StepPlan, StepResult
from quire.messages.worker import RunStep, SampledTokens, WorkerInput
from quire.runner.following import (
    Follower,
    digest_of,
    first_sample,
    tables_of,
    without_sampling,
)
from quire.runner.worker import Worker
from quire.sampling_params import PoolingParams, SamplingParams
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_compose import sampling_params
from tests.engine.test_exactness import SCHEDULES, make_llm

SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
BLOCKS = 300


class Replayed:
    """An executor whose plans are also carried out by a follower, over the same weights."""

    def __init__(self, llm: LLM) -> None:
        self.core: Any = llm._core._core
        self.worker: Worker = self.core.executor
        self.max_in_flight = self.worker.max_in_flight
        self.adapters = self.worker.adapters
        spec = replace(self.worker._spec, samples=False, draft=None)
        self.other = Worker(llm.config, spec)
        self.other.load(self.worker.runner.model)
        self.other.open_cache(llm.ready.num_blocks, spec.max_model_len)
        for each in (self.worker, self.other):
            each.runner.kv_cache.storage.zero_()  # what no step writes is equal too
        self.follower = Follower(self.other.runner)
        self.sampled: list[SampledTokens] = []
        self.num_steps = self.num_accepted = 0
        self.core.executor = self

    def execute(self, plan: StepPlan) -> Replayed:
        message = RunStep(without_sampling(plan), self.sampled)
        coded = msgspec.msgpack.encode(message)
        self.follower.run(msgspec.msgpack.decode(coded, type=WorkerInput))
        self.plan, self.future, self.sampled = plan, self.worker.execute(plan), []
        self.compare()
        return self

    def result(self) -> StepResult:
        result, rows = self.future.result(), [row for row in self.plan.rows if row.samples]
        if rows:
            tokens = [row.token_ids for row in result.sampled[: len(rows)]]
            self.sampled = [SampledTokens(result.step_id, tokens)]
            pairs = zip(rows, tokens, strict=True)
            self.num_accepted += sum(len(ids) - 1 for row, ids in pairs if row.draft_token_ids)
        self.num_steps += 1
        return result

    def compare(self) -> None:
        """The tokens before drafts, the block tables, the KV."""
        runners = [self.worker.runner, self.other.runner]
        known = {row.request_id: first_sample(row) for row in self.plan.rows}
        digests = [digest_of(tables_of(runner.seats, known)) for runner in runners]
        assert digests[0] == digests[1]
        assert runners[0].seats.seat_of == runners[1].seats.seat_of
        one, two = (runner.kv_cache.storage.view(torch.int16) for runner in runners)
        assert torch.equal(one, two)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)


@pytest.fixture(scope="module", params=[*SCHEDULES, "drafts"])
def replayed(
    request: pytest.FixtureRequest, servable: Callable[[str], ServableCheckpoint]
) -> Iterator[tuple[LLM, Replayed]]:
    options = dict(SCHEDULES.get(request.param, {"speculative_config": SPECULATION}))
    options.setdefault("num_gpu_blocks_override", BLOCKS)
    with make_llm(servable("qwen3"), max_logprobs=-1, **options) as llm:
        yield llm, Replayed(llm)


REQUESTS = st.lists(st.tuples(st.integers(0, 5), sampling_params()), min_size=1, max_size=12)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(REQUESTS, st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), max_size=3))
def test_a_follower_has_the_tokens_the_tables_and_the_kv(
    replayed: tuple[LLM, Replayed],
    requests: list[tuple[int, SamplingParams]],
    aborts: list[tuple[int, int]],
) -> None:
    """aborts: after how many steps, and which of the running requests."""
    llm, executor = replayed
    begin, step = executor.num_steps, executor.core.step
    texts = prompts(6, seed=3)

    def step_and_abort() -> Any:
        for when, which in aborts:
            running = sorted(executor.core.scheduler.requests)
            if executor.num_steps - begin == when and running:
                llm._core.send(AbortRequests([running[which % len(running)]]))
        return step()

    executor.core.step = step_and_abort
    try:
        llm.generate(
            [texts[index] for index, _ in requests], [one for _, one in requests], use_tqdm=False
        )
    finally:
        executor.core.step = step
    assert executor.num_steps > begin
    assert not executor.other.runner.seats.prompts and not executor.other.runner.seats.rules


def test_prompts_alone_are_followed_too(replayed: tuple[LLM, Replayed]) -> None:
    llm, executor = replayed
    begin = executor.num_steps
    batch = prompts(6, seed=8)
    for pooling in ("last", "mean"):
        llm.embed(batch, pooling_params=PoolingParams(pooling=pooling), use_tqdm=False)
    assert executor.num_steps > begin


def test_accepted_drafts_are_learned(servable: Callable[[str], ServableCheckpoint]) -> None:
    options = {"speculative_config": SPECULATION, "num_gpu_blocks_override": BLOCKS}
    with make_llm(servable("qwen3"), **options) as llm:
        executor = Replayed(llm)
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        llm.generate([[1, 2, 3] * 20] * 3, params, use_tqdm=False)
        assert executor.num_accepted > 10


def test_a_wrong_token_is_found(servable: Callable[[str], ServableCheckpoint]) -> None:
    """The comparison can fail."""
    with make_llm(servable("qwen3"), num_gpu_blocks_override=BLOCKS) as llm:
        executor = Replayed(llm)
        result = executor.result

        def wrong() -> StepResult:
            found = result()
            executor.sampled = [SampledTokens(each.step_id, [[5]]) for each in executor.sampled]
            return found

        executor.result = wrong  # type: ignore[method-assign]
        params = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={6: 100.0})
        with pytest.raises(AssertionError):
            llm.generate([[1, 2, 3]], params, use_tqdm=False)

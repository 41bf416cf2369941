"""Requests whose deadlines pass, through `LLM`: which finish reason, and what is kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from quire.engine.llm import LLM
from quire.outputs import RequestOutput
from quire.sampling_params import BeamSearchParams, SamplingParams
from quire.scheduler.invariants import check_invariants
from tests.engine.checkpoints import ServableCheckpoint

PROMPT = [5, 6, 7, 8]
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(servable: Callable[[str], ServableCheckpoint]) -> Iterator[LLM]:
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128}
    with LLM(str(servable("llama").directory), num_gpu_blocks_override=60, **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def clock(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each look at the clock is a second after the one before; a step looks twice."""
    seconds = itertools.count()
    monkeypatch.setattr(llm._core._core, "_clock", lambda: float(next(seconds)))
    yield
    scheduler = llm._core._core.scheduler
    check_invariants(scheduler)
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable, "a block leaked"


def submit(llm: LLM, params: object, deadline: float | None) -> str:
    llm._num_submitted += 1
    request = llm._front.read(PROMPT, params, request_id=str(llm._num_submitted), deadline=deadline)
    llm._apply(llm._front.start(request))
    return request.request_id


def wait(llm: LLM, *ids: str) -> list[RequestOutput]:
    return llm._wait(list(ids), use_tqdm=False)


def test_one_that_runs_keeps_its_tokens(llm: LLM) -> None:
    [cut] = wait(llm, submit(llm, LONG, 20.0))
    [whole] = wait(llm, submit(llm, LONG, None))
    part = cut.outputs[0]
    assert part.finish_reason == "timeout" and 0 < len(part.token_ids) < 20
    assert part.token_ids == whole.outputs[0].token_ids[: len(part.token_ids)]
    assert whole.outputs[0].finish_reason == "length"


def test_one_that_waits_ends_without_work(llm: LLM) -> None:
    running = [submit(llm, LONG, None), submit(llm, LONG, None)]
    outputs = wait(llm, submit(llm, LONG, 20.0), *running)
    assert [output.outputs[0].finish_reason for output in outputs] == [
        "expired",
        "length",
        "length",
    ]
    assert not outputs[0].outputs[0].token_ids
    times = outputs[0].metrics
    assert times.queued_ts > 0 and times.scheduled_ts == 0, "how long it waited is known"


def test_one_that_comes_too_late(llm: LLM) -> None:
    [output] = wait(llm, submit(llm, LONG, -1.0))
    assert output.outputs[0].finish_reason == "expired" and output.error is None


@pytest.mark.parametrize(("deadline", "reason"), [(-1.0, "expired"), (30.0, "timeout")])
def test_a_beam_search(llm: LLM, deadline: float, reason: str) -> None:
    [output] = wait(llm, submit(llm, BeamSearchParams(2, 60, ignore_eos=True), deadline))
    assert output.outputs[0].finish_reason == reason
    assert (len(output.outputs[0].token_ids) > 0) == (reason == "timeout")

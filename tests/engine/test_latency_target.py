"""The options of latency on a real engine: outputs with a target, and a refusal for a predicted wait."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.errors import ConfigError, QueueFullError
from quire.scheduler.cost_model import Work
from quire.scheduler.fitted import FittedCost
from tests.engine.checkpoints import ServableCheckpoint

OPTIONS = {"max_num_batched_tokens": 64, "max_model_len": 256, "num_gpu_blocks_override": 120}
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def test_outputs_are_the_same_with_a_target(servable: Callable[[str], ServableCheckpoint]) -> None:
    """Short prompts come first, so that their answers run while the long ones are computed."""
    prompts = [[3 + index] * (9 if index < 3 else 200) for index in range(6)]
    tokens, steps = [], []
    for target in (None, 0.001):
        llm = LLM(str(servable("llama").directory), max_num_seqs=4, itl_target=target, **OPTIONS)
        scheduler = llm._core._core.scheduler  # type: ignore[union-attr]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        steps.append(scheduler._step_id)
        llm.close()
    assert tokens[0] == tokens[1]
    assert steps[1] > steps[0] + 5, "the target had an effect"


def test_an_engine_may_start_from_what_was_measured_before(
    servable: Callable[[str], ServableCheckpoint], tmp_path: Path
) -> None:
    path = tmp_path / "cost.json"
    cost = FittedCost((1.0, 64.0), (0.010, 0.073), context=1e-6, prompt_context=1e-7)
    path.write_text(json.dumps(cost.content()))
    model = str(servable("llama").directory)
    with LLM(model, max_num_seqs=8, cost_model=str(path), **OPTIONS) as llm:
        costs = llm._core._core.scheduler.costs  # type: ignore[union-attr]
        work = Work(4, 400, 1.0, 48, 2000)
        assert costs.seconds(work) == pytest.approx(cost.seconds(work), rel=0.1)
        before = list(costs.coefficients)
        llm.generate([{"prompt_token_ids": [5] * 50}], PARAMS)
        assert costs.coefficients != before, "and goes on learning"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"cost file .*cost.json: it needs quire_cost: 1"):
        LLM(model, max_num_seqs=8, cost_model=str(path), **OPTIONS)


async def test_who_would_wait_too_long_is_refused_and_served_later(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    options = {"model": str(servable("llama").directory), "max_num_seqs": 1, "max_ttft": 1e-6}
    engine = await AsyncLLM.start(from_flat(OPTIONS | options))
    try:
        for _ in range(2):  # now it is known how long requests take
            async for _ in engine.submit([5] * 50, PARAMS):
                pass
        running = engine.submit([6] * 50, PARAMS)
        with pytest.raises(QueueFullError, match="max-ttft") as raised:
            engine.submit([7] * 50, PARAMS)
        assert 0.8 <= raised.value.retry_after <= 60.0
        async for _ in running:
            pass
        async for output in engine.submit([7] * 50, PARAMS):
            last = output
        assert last.finished
    finally:
        await engine.shutdown()

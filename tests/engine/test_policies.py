"""Who is served first changes no answer: every policy and budget gives the same bits
(docs/adr/0039: fair shares in an order that does not move)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quire.engine.llm import LLM
from quire.placement import Placement
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_exactness import GREEDY, Recorder, assert_same_bits, make_llm

PARAMS = GREEDY.replace(max_tokens=24)
COUNT = 16
TIGHT: dict[str, Any] = {"num_gpu_blocks_override": 16, "watermark": 0.0}
SCHEDULES: dict[str, dict[str, Any]] = {
    "budget 16": {"max_num_seqs": 16, "max_num_batched_tokens": 16},
    "budget 100, four seats": {"max_num_seqs": 4, "max_num_batched_tokens": 100},
    "tiny pool": TIGHT,
}


def answers(llm: LLM) -> tuple[list[list[int]], int]:
    """Of requests of three tenants with weights and priorities, and the number of preemptions."""
    front = llm._front
    asked = []
    for number, prompt in enumerate(prompts(COUNT)):
        place = Placement(
            tenant="abc"[number % 3], weight=1.0 + number % 2, priority=number % 4 // 3
        )
        request = front.read(prompt, PARAMS, placement=place)
        llm._apply(front.start(request))
        asked.append(request.request_id)
    outputs = {output.request_id: output for output in llm._wait(asked, use_tqdm=False)}
    found = [outputs[request_id] for request_id in asked]
    preempted = sum(output.metrics.num_preemptions for output in found)
    return [output.outputs[0].token_ids for output in found], preempted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_policy_gives_the_same_bits(
    schedule: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable("llama")
    with make_llm(checkpoint) as llm:
        recorder = Recorder(llm)
        alone = [llm.generate(p, PARAMS, use_tqdm=False)[0] for p in prompts(COUNT)]
        tokens, logits = [output.outputs[0].token_ids for output in alone], recorder.logits
    for policy in ("fcfs", "priority", "fair"):
        options = {**SCHEDULES[schedule], "scheduling_policy": policy}
        with make_llm(checkpoint, **options) as llm:
            recorder = Recorder(llm)
            found, preempted = answers(llm)
            assert found == tokens, policy
            assert_same_bits(recorder.logits, logits)
            assert (preempted > 0) == (schedule == "tiny pool"), policy

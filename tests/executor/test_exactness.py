"""What tests/engine/test_exactness.py promises, on several ranks: the logits of one device, bit for bit, with
every schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_exactness import (
    GREEDY,
    SCHEDULES,
    Recorder,
    assert_same_bits,
    make_llm,
    tokens_of,
)

SHORT = GREEDY.replace(max_tokens=24)
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    # The vocabulary of all has 199 tokens.
    ("qwen2", {"tensor_parallel_size": 4}),  # tied; two KV heads, each on two ranks
    ("olmo2", {"tensor_parallel_size": 2}),  # norms over all heads
    ("llama", {"tensor_parallel_size": 2, "quantization": "int8"}),
    ("gemma3", {"pipeline_parallel_size": 3}),  # windows; a stage has layers of one group only
    ("llama-mha-tied", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_schedule_on_every_layout_gives_the_logits_of_one_device(
    name: str, layout: dict[str, Any], servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    batch = prompts(24)
    stored = {"quantization": layout.get("quantization")}
    with make_llm(checkpoint, **stored) as llm:
        recorder = Recorder(llm)
        expected = tokens_of(llm.generate(batch, SHORT, use_tqdm=False))
    labels = ["budget 16", "tiny pool"]
    if name == "qwen2":  # a cache is the scheduler's matter, the same on every layout
        labels.append("no prefix cache")
    for label in labels:
        options: dict[str, Any] = {**SCHEDULES[label], **layout, "worker_timeout": 30.0}
        with make_llm(checkpoint, **options) as llm:
            on_ranks = Recorder(llm)
            outputs = llm.generate(batch, SHORT, use_tqdm=False)
            assert tokens_of(outputs) == expected, label
            assert_same_bits(on_ranks.logits, recorder.logits)
            preemptions = sum(output.metrics.num_preemptions for output in outputs)
            assert (preemptions > 0) == (label == "tiny pool"), label

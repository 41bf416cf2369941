"""Layers with a sliding window keep the blocks of their window only, and prefixes are still found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quire.engine.llm import LLM
from quire.sampling_params import SamplingParams
from tests.engine.checkpoints import ServableCheckpoint

WINDOW, BUDGET, LENGTH = 24, 16, 240
HELD = 4
"""Blocks that a group of layers holds: (24 + 16 - 3) // 16 + 2."""
WHOLE = LENGTH // 16
PROMPT = [5 + 7 * i % 310 for i in range(180)]


def make_llm(checkpoint: ServableCheckpoint, num_blocks: int) -> LLM:
    return LLM(
        str(checkpoint.directory),
        max_model_len=LENGTH,
        max_num_seqs=2,
        max_num_batched_tokens=BUDGET,
        num_gpu_blocks_override=1 + num_blocks,
        watermark=0.0,
    )


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [
        ("mistral-window", HELD),  # one group, and it has a window
        ("gemma3-multimodal", WHOLE + 2 * HELD),  # three groups of one layer, two with a window
    ],
)
def test_a_long_sequence_fits_where_only_windows_do(
    name: str, num_blocks: int, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    with make_llm(checkpoint, num_blocks) as llm:
        core: Any = llm._core
        kv, held = core._core.scheduler.kv, []
        schedule = core._core.scheduler.schedule

        def spying_schedule() -> Any:
            plan = schedule()
            held.append(kv.num_referenced)
            return plan

        core._core.scheduler.schedule = spying_schedule
        assert len(kv.windows) == (3 if name.startswith("gemma3") else 1)
        (output,) = llm.generate([PROMPT], greedy(60), use_tqdm=False)
        assert output.outputs[0].token_ids == checkpoint.greedy(PROMPT, 60)
        assert max(held) <= num_blocks < len(kv.windows) * WHOLE
        assert output.metrics.num_preemptions == 0, "blocks behind the window were not freed"


@pytest.mark.parametrize("name", ["mistral-window", "gemma3-multimodal"])
def test_a_prefix_is_found_by_its_window(
    name: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    """A second prompt shares 160 of its tokens. Its window's blocks are there, and those before are not
    needed."""
    checkpoint = servable(name)
    other = PROMPT[:160] + PROMPT[:20]
    with make_llm(checkpoint, 3 * WHOLE + 20) as llm:
        llm.generate([PROMPT], greedy(1), use_tqdm=False)
        (output,) = llm.generate([other], greedy(30), use_tqdm=False)
    assert output.num_cached_tokens == 160
    assert output.outputs[0].token_ids == checkpoint.greedy(other, 30)

"""A model that drafts for itself is always right, if its second KV cache is: through prefix hits, copies,
forks, preemption, chunks and evicted blocks."""

from __future__ import annotations

import random

import pytest

from quire import LLM, SamplingParams
from quire.builtin import MODEL_DIR

SMALL = {
    "speculative_config": {
        "method": "draft_model",
        "model": str(MODEL_DIR),
        "num_speculative_tokens": 4,
    },
    "max_model_len": 160,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 48,
}


def watch(llm: LLM) -> list[tuple[list[int], list[int]]]:
    """Known tokens and drafts of every proposal from now on."""
    drafter = llm._core._core.executor.runner.drafter
    seen, propose = [], drafter.propose

    def watched(tasks):
        known = [drafter._rows.token_ids[t.seat, : t.num_tokens].tolist() for t in tasks]
        found = propose(tasks)
        seen.extend((ids, list(drafts)) for ids, drafts in zip(known, found, strict=True))
        return found

    drafter.propose = watched
    return seen


@pytest.mark.parametrize(("num_blocks", "temperature"), [(11, 0.8), (24, 0.0), (200, 0.8)])
def test_every_draft_is_right(num_blocks: int, temperature: float) -> None:
    random_ = random.Random(num_blocks)
    with LLM(num_gpu_blocks_override=num_blocks, **SMALL) as llm:
        seen = watch(llm)
        texts = []
        stem = [random_.randrange(3, 4000) for _ in range(70)]
        for round_ in range(3):
            prompts = [
                {
                    "prompt_token_ids": [
                        *stem[: random_.randrange(1, 70)],
                        random_.randrange(3, 4000),
                    ]
                }
                for _ in range(8)
            ]
            params = [
                SamplingParams(
                    max_tokens=random_.randrange(1, 60),
                    temperature=temperature,
                    top_k=50,
                    seed=100 * round_ + i,
                    n=2 if i % 4 == 0 and temperature else 1,
                    ignore_eos=True,
                )
                for i in range(8)
            ]
            for output in llm.generate(prompts, params, use_tqdm=False):
                texts += [[*output.prompt_token_ids, *each.token_ids] for each in output.outputs]
    assert len(seen) > 50
    for known, drafts in seen:
        text = [*known, *drafts]
        assert any(t[: len(text)] == text[: len(t)] and len(t) >= len(known) for t in texts), (
            known,
            drafts,
        )

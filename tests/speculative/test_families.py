"""Every family: drafts and adapters together, over `LLM`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quire.lora.request import LoRARequest
from quire.sampling_params import SamplingParams
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_exactness import make_llm
from tests.models.variants import VARIANTS
from tests.weights.adapter_writer import write_adapter

FAMILIES = sorted({fields.get("model_type", name.split("-")[0]): name
                   for name, (_, fields) in VARIANTS.items()}.values())  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens_with_drafts_and_an_adapter(
    name: str, servable: Callable[[str], ServableCheckpoint], tmp_path: Path
) -> None:
    checkpoint, seen = servable(name), []
    for speculation in ({}, {"method": "suffix"}):
        llm = make_llm(checkpoint, enable_lora=True, speculative_config=speculation)
        if not seen:
            spec = llm._core._core.executor.runner.model.spec
            write_adapter(tmp_path, spec, ["_proj"])
        sampling = SamplingParams(max_tokens=24, temperature=0.6, seed=5, logprobs=1)
        mine = LoRARequest("mine", 1, str(tmp_path))
        batch = prompts(2, seed=1) * 2
        outputs = [
            llm.generate(batch, sampling, lora_request=[None, mine, mine, None], use_tqdm=False)
            for _ in range(2)
        ]
        seen.append(
            [[(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in some] for some in outputs]
        )
        llm.close()
    assert seen[0] == seen[1]
    (plain, _, adapted, _), _ = seen[0]
    assert plain != adapted

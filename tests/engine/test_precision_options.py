"""Options that change what is computed: a KV cache in fp8, and inputs of 8 bits."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams
from quire.outputs import RequestOutput

PROMPTS = ["The capital of", "def add(a, b):", "Once upon a time, in a small village " * 6]
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)


def results(outputs: list[RequestOutput]) -> list[object]:
    return [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]


@pytest.mark.parametrize(
    ("option", "quantization"),
    [({"kv_cache_dtype": "fp8"}, None), ({"cpu_activation_bits": 8}, "int8")],
)
def test_it_changes_results_and_no_schedule_does(
    option: dict[str, object], quantization: str | None
) -> None:
    with LLM(quantization=quantization) as llm:
        plain = results(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    with LLM(quantization=quantization, **option) as llm:  # type: ignore[arg-type]
        together = results(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
        again = results(llm.generate(PROMPTS, PARAMS, use_tqdm=False))  # prefixes are in the cache
    with LLM(quantization=quantization, max_num_batched_tokens=16, max_num_seqs=4, **option) as llm:  # type: ignore[arg-type]
        alone = [results(llm.generate([p], PARAMS, use_tqdm=False))[0] for p in PROMPTS]
    assert together == again == alone
    assert together != plain

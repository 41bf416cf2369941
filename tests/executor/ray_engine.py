"""Engines on a Ray cluster, one after another, in a process of their own. What they say is lines of JSON."""

from __future__ import annotations

import json
import sys

from quire import LLM, SamplingParams
from quire.errors import QuireError

PROMPTS = ["The sun", "Once upon a time there was"]


def main() -> None:
    tokens = SamplingParams(temperature=0, max_tokens=12)
    endless = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    for layout in sys.argv[1:]:
        tensor, stages = map(int, layout.split("x"))
        options = {} if layout == "1x1" else {"distributed_executor_backend": "ray"}
        try:
            llm = LLM(
                max_model_len=2048,
                num_gpu_blocks_override=300,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=stages,
                **options,
            )
        except QuireError as error:
            say(error)
            continue
        with llm:
            answers = llm.generate(PROMPTS, tokens, use_tqdm=False)
            say([answer.outputs[0].token_ids for answer in answers])
            if sys.stdin.readline().strip() == "endless":
                try:
                    while True:
                        llm.generate(PROMPTS, endless, use_tqdm=False)
                except QuireError as error:
                    say(error)


def say(what: object) -> None:
    text = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else what
    print(json.dumps(text), flush=True)


if __name__ == "__main__":
    main()

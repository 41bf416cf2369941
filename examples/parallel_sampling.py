"""Several answers to one prompt: its KV blocks are computed once and shared by all of them.

`python examples/parallel_sampling.py [MODEL]`. The same seed gives the same answers, whatever else runs.
"""

import sys

from quire import LLM, SamplingParams

params = SamplingParams(n=4, temperature=1.0, top_p=0.95, seed=7, max_tokens=24, logprobs=0)

if __name__ == "__main__":
    with LLM(model=sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        [output] = llm.generate(["The block table"], params)
        for sequence in output.outputs:
            mean = (sequence.cumulative_logprob or 0.0) / len(sequence.token_ids)
            print(f"{sequence.index}  {mean:7.3f} per token  {sequence.text!r}")

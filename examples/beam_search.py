"""The likeliest continuations instead of sampled ones. `python examples/beam_search.py [MODEL]`"""

import sys

from quire import LLM, BeamSearchParams

prompt = "A KV cache holds"
params = BeamSearchParams(beam_width=4, max_tokens=12)

if __name__ == "__main__":
    with LLM(model=sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        [output] = llm.beam_search([prompt], params)
        for beam in output.sequences:  # the best first; the text begins with the prompt
            print(f"{beam.cum_logprob:8.3f}  {beam.text!r}")

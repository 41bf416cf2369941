"""How likely a model finds each token of a text; none is generated. `python examples/prompt_logprobs.py`"""

import math

from quire import LLM, SamplingParams

texts = ["A list is a sequence of items.", "A list is a banana of knees."]
params = SamplingParams(max_tokens=0, prompt_logprobs=0)

if __name__ == "__main__":
    with LLM() as llm:
        for output in llm.generate(texts, params, use_tqdm=False):
            positions = output.prompt_logprobs[1:]  # nothing comes before the first token
            chosen = [
                position[token]
                for token, position in zip(output.prompt_token_ids[1:], positions, strict=True)
            ]
            perplexity = math.exp(-sum(entry.logprob for entry in chosen) / len(chosen))
            print(f"perplexity {perplexity:8.1f}  {output.prompt}")
            for entry in chosen:
                print(f"    {entry.logprob:8.3f}  rank {entry.rank:<5} {entry.decoded_token!r}")

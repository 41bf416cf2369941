"""Prompts in, texts out, in one batch and in this process. `python examples/offline_generate.py [MODEL]`"""

import sys

from quire import LLM, SamplingParams

prompts = ["os.path.join is", "A KV cache holds", "In Python, a list"]
params = SamplingParams(temperature=0, max_tokens=24)

if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else None  # None is the built-in model
    with LLM(model=model) as llm:
        for output in llm.generate(prompts, params):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))

"""A conversation through the model's chat template. `python examples/chat.py [MODEL]`

The second turn repeats the first one's tokens: `num_cached_tokens` says how many were not computed again.
"""

import sys

from quire import LLM, SamplingParams

questions = ["what does os.path.join do?", "show me an example"]
params = SamplingParams(temperature=0, max_tokens=64)

if __name__ == "__main__":
    messages = [{"role": "system", "content": "You are a helpful Python tutor."}]
    with LLM(model=sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        for question in questions:
            messages.append({"role": "user", "content": question})
            [output] = llm.chat(messages, params)
            answer = output.outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            print("you  ", question)
            print("quire", answer.strip())
            print(
                f"      ({output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens cached)"
            )

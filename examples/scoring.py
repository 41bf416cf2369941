"""How likely texts are: a prompt's own logprobs, with nothing generated. `quire serve`, then
`python examples/scoring.py [URL]`

`echo` puts the prompt into the answer, `logprobs` its tokens' values with it, and `max_tokens=0` ends there.
This is how evaluation harnesses rank the choices of a question.
"""

import math
import sys

import openai

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
model = client.models.list().data[0].id

texts = ["return the sum of two numbers", "numbers two of sum the return"]
scored = client.completions.create(model=model, prompt=texts, echo=True, logprobs=1, max_tokens=0)
for choice in scored.choices:
    given = choice.logprobs
    values = given.token_logprobs[1:]  # nothing comes before the first token
    print(f"perplexity {math.exp(-sum(values) / len(values)):8.1f}  {choice.text}")
    for token, value, top in zip(given.tokens[1:3], values, given.top_logprobs[1:3], strict=False):
        likeliest = max(top, key=top.get)
        print(
            f"    {token!r} has {value:.2f}, the likeliest is {likeliest!r} with {top[likeliest]:.2f}"
        )

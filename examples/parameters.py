"""What is sampled with, and what has no effect. `quire serve`, then `python examples/parameters.py [URL]`

The answer says which parameters were in force, the model's defaults included, and warns of fields that
nothing reads; with `quire serve --strict-requests` such a field is a 400 that names it.
"""

import sys

import openai

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
model = client.models.list().data[0].id

answer = client.completions.create(
    model=model,
    prompt="The block table",
    max_tokens=12,
    seed=7,
    logit_bias={"71": -100},
    extra_body={
        "min_tokens": 4,
        "bad_words": [" the"],
        "repetition_detection": {"max_pattern_size": 3, "min_count": 4},
        "return_effective_params": True,
        "temprature": 0.2,
    },
)
print(repr(answer.choices[0].text))
for name, value in answer.effective_params.items():
    print(f"    {name} = {value}")
print("warnings:", answer.warnings)

try:
    client.completions.create(model=model, prompt="x", top_p=7)
except openai.BadRequestError as error:
    print(f"400 for {error.param}: {error.body['message']}")

"""Vectors of texts, and documents ranked by them. `quire serve`, then `python examples/embeddings.py [URL]`

Any decoder gives vectors, with no model of its own for it: the hidden state of the last token, or here the
mean of all. A model trained to embed gives better ones.
"""

import sys

import openai

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
model = client.models.list().data[0].id

query = "what does os.path.join do?"
texts = [
    "json.loads(text) parses JSON",
    "os.path.join(a, b) joins two paths",
    "sorted(numbers) returns a sorted list",
]
mean = {"pooling": "mean"}
made = client.embeddings.create(model=model, input=texts, extra_body=mean)
print(
    f"{len(made.data)} vectors of {len(made.data[0].embedding)} numbers, {made.usage.total_tokens} tokens"
)

asked = {"model": model, "query": query, "documents": texts, **mean}
ranked = client.post("/rerank", body=asked, cast_to=object)
for result in ranked["results"]:
    print(f"{result['relevance_score']:.3f}  {result['document']['text']}")

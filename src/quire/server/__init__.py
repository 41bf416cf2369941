"""The HTTP front end: OpenAI's endpoints and vLLM's extras over one engine.

In the order of a request: `middleware` (id, CORS, key, body limit), `body` and `requests` (bytes to a
checked model, unknown fields reported), `prompts` and `sampling` (model to token ids and
`SamplingParams`), the engine, then `completions` / `chat` (outputs to structs), `sse` and `live`
(writing, disconnects, shutdown). `run.serve` is the server's process.
"""

from __future__ import annotations

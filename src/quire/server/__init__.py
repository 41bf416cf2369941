"""The HTTP front end: OpenAI's endpoints and vLLM's extras over one engine.

In the order in which a request meets them: `middleware` (id, CORS, key, body limit), `body` and
`requests` (bytes to a checked model, unknown fields named), `prompts` and `sampling` (model to token
ids and `SamplingParams`), the engine, then `completions` / `chat` (outputs to structs), `sse` and
`live` (writing, disconnects, shutdown). `run.serve` is the process around it.
"""

from __future__ import annotations

"""A body that is served, for every route that reads one. `test_classes.py` checks that none is missing."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "a"}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/chat/completions/batch": {"messages": [[USER], [USER]]},
    "/v1/responses": {"input": "a"},
    "/v1/responses/input_tokens": {"input": "a"},
    "/v1/messages": {"messages": [USER], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/embeddings": {"messages": [USER]},
    "/pooling": {"messages": [USER]},
    "/tokenize": {"messages": [USER]},
}
"""Those that render the chat template."""
COUNTING = ("/v1/responses/input_tokens", "/v1/messages/count_tokens")
"""Those that say how long a prompt is. They do not name fields that they have no use for."""

TEXTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
}
"""Those that encode a text without a template."""
ALIASES = ("/score", "/rerank", "/v2/rerank")
"""Other names of the same function."""

OTHERS: dict[str, dict[str, Any]] = {
    "/detokenize": {"tokens": [2]},
    "/abort_requests": {"request_ids": ["cmpl-1"]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}

PROMPTED = CONVERSATIONS | TEXTS
ALL = PROMPTED | OTHERS


def saying(path: str, text: object) -> dict[str, Any]:
    """The body of a conversation route, whose user says `text`, which may be a list of parts."""
    body = dict(CONVERSATIONS[path])
    message = {"role": "user", "content": text}
    if path.startswith("/v1/responses"):
        return body | {"input": [message]}
    return body | {"messages": [[message]] if path.endswith("batch") else [message]}

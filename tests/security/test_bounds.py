"""Everything that a client may send many of has a bound, and the bound has a typed answer."""

from __future__ import annotations

import pytest
from tests.security.bodies import ALL, PROMPTED, USER

from quire.config import EngineConfig, LoRAConfig

MANY = 8200
"""More than any of these may have; `test_limits.py` has the numbers."""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
LISTS = {
    "prompt": ["a"] * MANY, "input": ["a"] * MANY, "messages": [USER] * MANY, "documents": ["a"] * MANY,
    "text_2": ["a"] * MANY, "tools": [TOOL] * MANY, "stop": ["x"] * MANY, "bad_words": ["x"] * MANY,
    "stop_token_ids": [2] * MANY, "allowed_token_ids": [2] * MANY,
    "logit_bias": {str(i): 1 for i in range(MANY)}, "logprob_token_ids": [2] * MANY,
    "chat_template_kwargs": {str(i): 1 for i in range(MANY)}, "stop_sequences": ["x"] * MANY,
    "request_ids": ["x"] * MANY, "tokens": [2] * (2**20 + 1), "include": ["x"] * MANY, "n": 10**6,
}  # fmt: skip


@pytest.mark.parametrize("path", ALL)
async def test_every_list_of_every_route_is_bounded(make_client, engine, path):
    """A list that a route knows has a bound, and one that it does not know makes no work."""
    lora = EngineConfig(lora=LoRAConfig(enable_lora=True))
    client = make_client(engine_config=lora, enable_admin_endpoints=True, max_list_items=MANY - 1)
    for name, value in LISTS.items():
        if name == "tokens" and path != "/detokenize":
            continue  # a megabyte
        before = len(engine.submitted)
        answer = await client.post(path, json=ALL[path] | {name: value})
        assert answer.status_code < 500, (name, answer.text[:300])
        assert len(answer.content) < 200_000, name
        if answer.status_code == 200:
            assert len(engine.submitted) - before <= 2, name


@pytest.mark.parametrize("path", PROMPTED)
async def test_every_route_has_the_same_limit_of_a_body(make_client, engine, path):
    client = make_client(max_body_bytes=1000)
    answer = await client.post(path, json=PROMPTED[path] | {"x": "y" * 1000})
    assert answer.status_code == 413 and engine.submitted == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a"] * 9, "n": 8}),
        ("/v1/chat/completions/batch", {"messages": [[USER]] * 9, "n": 8}),
        ("/v1/chat/completions", {"messages": [USER], "n": 65}),
    ],
)
async def test_prompts_times_n_are_the_sequences_that_count(make_client, engine, path, body):
    client = make_client(max_sequences_per_request=64)
    answer = await client.post(path, json=body | {"temperature": 1})
    assert answer.status_code == 400 and engine.submitted == [], answer.text

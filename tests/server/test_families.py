"""A directory written by `save_pretrained`, served by `quire serve`, asked by the `openai` client: the tokens
are transformers'."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.engine.checkpoints import prompts, write_checkpoint

from quire.cli.demo.server import ServerProcess

WHOLE_SURFACE = ["llama-llama3", "mistral-window", "qwen2", "qwen3"]
"""The endpoints know nothing of a model's layers: a few families suffice."""
FAMILIES = [
    *WHOLE_SURFACE,
    "gemma2", "gemma3-multimodal", "olmo2", "olmo3", "phi3-longrope-long", "granite", "smollm3",
    "ministral3-multimodal-tied",
]  # fmt: skip
NEW_TOKENS = 64


@pytest.fixture
def served(tmp_path: Path):
    """Serve a directory; stopped at the end of the test."""
    servers: list[ServerProcess] = []

    def serve(directory: Path) -> openai.OpenAI:
        log = tmp_path / "server"
        log.mkdir()
        server = ServerProcess.start({"model": str(directory), "served_model_name": ["m"]}, log)
        servers.append(server)
        asyncio.run(server.wait_ready())
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    yield serve
    for server in servers:
        server.stop()


@pytest.mark.parametrize("name", FAMILIES)
def test_openai_client_gets_transformers_tokens(
    name: str, tmp_path: Path, served: Callable[[Path], openai.OpenAI]
) -> None:
    checkpoint = write_checkpoint(name, tmp_path / "model")
    batch = prompts(6, longest=90, seed=21)
    expected = [checkpoint.greedy(prompt, NEW_TOKENS) for prompt in batch]
    with served(checkpoint.directory) as client:
        extra = {"return_token_ids": True, "ignore_eos": True}

        def complete(prompt: list[int]) -> list[int]:
            answer = client.completions.create(
                model="m", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, extra_body=extra
            )
            return answer.choices[0].model_extra["token_ids"]

        def stream(prompt: list[int]) -> list[int]:
            chunks = client.completions.create(
                model="m", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True,
                extra_body=extra,
            )  # fmt: skip
            return [
                token
                for chunk in chunks
                for choice in chunk.choices
                for token in choice.model_extra["token_ids"]
            ]

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(complete, batch)) == expected
            assert list(pool.map(stream, batch)) == expected
        if name in WHOLE_SURFACE:
            try_the_surface(client)


def try_the_surface(client: openai.OpenAI) -> None:
    """What each endpoint is for, once: that it holds for every parameter is tested elsewhere."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    answer = client.chat.completions.create(
        **ask,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        logprobs=True,
        max_tokens=60,
    )
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 22)
    assert answer.choices[0].logprobs is not None
    called = client.chat.completions.create(
        **ask,
        tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
    )
    [call] = called.choices[0].message.tool_calls or []
    assert call.type == "function" and json.loads(call.function.arguments)["n"] in (1, 22)
    scored = client.completions.create(
        model="m", prompt=[3, 4, 5, 6], echo=True, logprobs=1, max_tokens=0
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None and len(logprobs.token_logprobs) == 4
    beams = client.completions.create(
        model="m", prompt=[3, 4], n=2, max_tokens=4, extra_body={"use_beam_search": True}
    )
    assert len(beams.choices) == 2
    vectors = client.embeddings.create(model="m", input=["a", "b", "a"]).data
    assert vectors[0].embedding == vectors[2].embedding != vectors[1].embedding
    response = client.responses.create(model="m", input="hi", max_output_tokens=4)
    assert response.usage is not None and 1 <= response.usage.output_tokens <= 4

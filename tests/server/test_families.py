"""A directory written by `save_pretrained`, served by `quire serve`, asked by the `openai` client: the tokens
are transformers'."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from tests.engine.checkpoints import prompts, write_checkpoint

from quire.cli.demo.server import ServerProcess

FAMILIES = ["llama-llama3", "mistral-window", "qwen2", "qwen3"]
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

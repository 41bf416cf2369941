"""`quire serve -tp 2`, asked by the `openai` client: the answers of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from quire.cli.demo.server import ServerProcess

OPTIONS: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 512,
    "speculative_config": {"method": "draft_model"},
}
QUESTION: Any = [{"role": "user", "content": "What does os.path.join do?"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[openai.OpenAI]]:
    """Of a server with one rank, and of one with two."""
    servers = [
        ServerProcess.start(
            {**OPTIONS, "tensor_parallel_size": size}, tmp_path_factory.mktemp(f"tp{size}")
        )
        for size in (1, 2)
    ]
    clients = []
    try:
        for server in servers:
            asyncio.run(server.wait_ready())
            clients.append(openai.OpenAI(base_url=server.url + "/v1", api_key="none"))
        yield clients
    finally:
        for client in clients:
            client.close()
        processes = [
            process
            for server in servers
            for process in psutil.Process(server._process.pid).children(recursive=True)
        ]
        for server in servers:
            server.stop()
        assert len(processes) >= 3, "two cores and a rank"
        assert not psutil.wait_procs(processes, timeout=60)[1]


def both(clients: list[openai.OpenAI], ask: Any) -> None:
    one, two = (ask(client) for client in clients)
    assert one == two


def test_text_with_logprobs(clients: list[openai.OpenAI]) -> None:
    def ask(client: openai.OpenAI) -> Any:
        chat = client.chat.completions.create(
            model="quire-builtin", messages=QUESTION, max_tokens=40, temperature=0.7, seed=3,
            logprobs=True, top_logprobs=2, n=2,
        )  # fmt: skip
        text = client.completions.create(
            model="quire-builtin", prompt="import os\n", max_tokens=20, temperature=0, logprobs=2,
            extra_body={"prompt_logprobs": 1},
        )  # fmt: skip
        prompt = text.choices[0].model_extra or {}
        return (
            [(each.message.content, each.logprobs) for each in chat.choices],
            text.choices[0].text,
            text.choices[0].logprobs,
            prompt["prompt_logprobs"],
        )

    both(clients, ask)


def test_streams_schemas_and_vectors(clients: list[openai.OpenAI]) -> None:
    def ask(client: openai.OpenAI) -> Any:
        stream = client.chat.completions.create(
            model="quire-builtin", messages=QUESTION, max_tokens=30, temperature=0, stream=True
        )
        schema: Any = {
            "type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
        }  # fmt: skip
        structured = client.chat.completions.create(
            model="quire-builtin",
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            response_format=schema,
        )
        vector = client.embeddings.create(model="quire-builtin", input="os.path")
        pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
        return "".join(pieces), structured.choices[0].message.content, vector.data[0].embedding

    both(clients, ask)

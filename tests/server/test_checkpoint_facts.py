"""A checkpoint as people publish them, over HTTP: tensors without `model.`, a tokenizer that names another
end than the configs, end ids beyond the vocabulary, a stretched context, mistakes in generation_config."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from tests.engine.checkpoints import SPECIAL, VOCAB_SIZE, write_checkpoint

from quire.cli.demo.server import ServerProcess

CHAT = {"messages": [{"role": "user", "content": "abc"}]}
PROMPT = [7, 8]
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
GENERATION = {
    "eos_token_id": [2, VOCAB_SIZE, 10**9], "do_sample": False, "top_p": 1.5, "repetition_penalty": 0,
    "temperature": None, "top_k": 0, "max_new_tokens": "20",
}  # fmt: skip


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The checkpoint, and what follows PROMPT if nothing ends it."""
    directory = tmp_path_factory.mktemp("published")
    checkpoint = write_checkpoint(
        "llama", directory, max_position_embeddings=64, rope_parameters=ROPE
    )
    return directory, checkpoint.greedy(PROMPT, 40)


@pytest.fixture(scope="module")
def server(free: tuple[Path, list[int]]) -> Iterator[tuple[httpx.Client, str]]:
    """A client, and the server's log."""
    directory, tokens = free
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        directory / "model.safetensors",
    )
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    end = next(token for token in tokens[3:] if token >= len(SPECIAL))
    settings["eos_token"] = next(text for text, token in vocabulary.items() if token == end)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    options = {"model": str(directory), "served_model_name": ["m"], "max_model_len": 256}
    log = directory / "server"
    log.mkdir()
    process = ServerProcess.start(options | {"dtype": "float32"}, log)
    try:
        asyncio.run(process.wait_ready())
        with httpx.Client(base_url=process.url, timeout=60) as client:
            yield client, (log / "server.log").read_text()
    finally:
        process.stop()


def complete(client: httpx.Client, **fields: object) -> dict[str, object]:
    ask = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    answer = client.post("/v1/completions", json=ask | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_text_ends_at_the_tokenizers_end(
    server: tuple[httpx.Client, str], free: tuple[Path, list[int]]
) -> None:
    client, _ = server
    _, tokens = free
    end = next(token for token in tokens[3:] if token >= len(SPECIAL))
    choice = complete(client)
    assert choice["token_ids"] == tokens[: tokens.index(end) + 1]
    assert choice["finish_reason"] == "stop"
    assert complete(client, ignore_eos=True)["token_ids"] == tokens
    late = complete(client, min_tokens=30)["token_ids"]
    assert isinstance(late, list) and len(late) >= 30 and end not in late[:30]
    shown = complete(client, return_token_ids=False)["text"]
    assert shown == complete(client, skip_special_tokens=False)["text"]  # the end is never shown


def test_defaults_of_the_model_make_no_request_fail(server: tuple[httpx.Client, str]) -> None:
    client, log = server
    for url, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "abc"})):
        ask = body | {"n": 2, "max_tokens": 12, "return_effective_params": True}
        answer = client.post(url, json=ask)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 2
        effective = answer.json()["effective_params"]
        assert (effective["temperature"], effective["top_p"], effective["top_k"]) == (1.0, 1.0, 0)
    for field in ("top_p is 1.5", "repetition_penalty is 0", "max_new_tokens is '20'"):
        assert log.count(f"generation_config.json: {field}") == 1
    for token in (VOCAB_SIZE, 10**9):
        assert log.count(f"generation_config.json: eos_token_id {token} is no token") == 1


def test_stop_token_ids_beyond_the_vocabulary_are_refused(
    server: tuple[httpx.Client, str],
) -> None:
    client, _ = server
    for token in (VOCAB_SIZE, 10**9, -1):
        ask = {"prompt": PROMPT, "stop_token_ids": [token], "min_tokens": 4, "max_tokens": 8}
        assert client.post("/v1/completions", json=ask).status_code == 400
    assert complete(client, stop_token_ids=[VOCAB_SIZE - 1], min_tokens=4)


def test_a_grammar_ends(server: tuple[httpx.Client, str]) -> None:
    client, _ = server
    choice = complete(client, structured_outputs={"choice": ["abc"]})
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")


def test_the_stretched_context_is_served(server: tuple[httpx.Client, str]) -> None:
    client, _ = server
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 256
    choice = complete(client, prompt=[7] * 200, max_tokens=56, ignore_eos=True)
    assert len(choice["token_ids"]) == 56  # type: ignore[arg-type]
    too_long = {"prompt": [7] * 257, "max_tokens": 1}
    assert client.post("/v1/completions", json=too_long).status_code == 400

"""Every file in examples/ runs on the built-in model, as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OFFLINE = {
    "offline_generate.py": "->",
    "chat.py": "quire",
    "parallel_sampling.py": "per token",
    "beam_search.py": "A KV cache holds",
    "prompt_logprobs.py": "rank 1 ",
    "structured_output.py": '"stars"',
    "logit_bias.py": "digits only",
    "run_batch.py": "vector 200",
    "speculation.py": "the same answers",
    "disaggregation.py": "came from the prefill server",
    "lora.py": "mine: 'I am an adapter of rank 8.'",
}
"""File -> a word that its output must have."""
WITH_SERVER = {
    "streaming_client.py": "tokens)",
    "embeddings.py": "0.",
    "tools.py": "multiply(",
    "scoring.py": "perplexity",
    "parameters.py": "400 for top_p",
    "responses.py": "input tokens cached",
    "anthropic_messages.py": "multiply(",
}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


def run_example(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *words],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_none_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == OFFLINE.keys() | WITH_SERVER.keys()


@pytest.mark.parametrize("name", OFFLINE)
def test_offline(name: str) -> None:
    assert OFFLINE[name] in run_example(name)


@pytest.mark.parametrize("name", WITH_SERVER)
def test_with_a_server(name: str, demo_server) -> None:
    assert WITH_SERVER[name] in run_example(name, demo_server.url + "/v1")

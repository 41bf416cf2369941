"""The commands on the built-in model, in processes of their own, as a person runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.weights.adapter_writer import write_adapter

import quire
from quire.config import from_flat
from quire.engine.setup import locate, resolve

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(quire.__file__).parents[1])}

ENDLESS = ("--load-format", "dummy", "--temperature", "1")
"""Random weights hardly ever end an answer, so that a signal finds one in the middle."""


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire", *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=ENVIRONMENT,
    )


def test_generate_is_reproducible_and_quiet() -> None:
    words = (
        "generate",
        "what is a block?",
        "--seed",
        "3",
        "--temperature",
        "1",
        "--max-tokens",
        "12",
    )
    first, second = run(*words), run(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.endswith("\n")
    assert first.stderr == ""


def test_chat_from_a_pipe() -> None:
    done = run(
        "chat", "--temperature", "0", "--max-tokens", "8", stdin="what is Quire?\n/reset\n/exit\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) >= 1


def test_ctrl_c_stops_an_answer_quietly_then_the_chat(spawn) -> None:
    """To the whole group, as a terminal sends it: the engine core must not die of it by itself."""
    process = spawn("chat", *ENDLESS, "--max-tokens", "300")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("tell me about os.path\n")
    process.stdin.flush()
    process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    process.stdin.write("what is Quire?\n")
    process.stdin.flush()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert len(out.splitlines()) >= 2, "the next question was answered"


def test_ctrl_c_ends_generate_with_130_and_no_traceback(spawn) -> None:
    process = spawn("generate", "once", "--raw", *ENDLESS, "--max-tokens", "2000")
    assert process.stdout is not None
    process.stdout.read(10)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--max-model-len", "999999"], "max_model_len"),
        (["--num-gpu-blocks-override", "2"], "--max-model-len 16"),
        (["--temperature", "9"], "temperature must be in [0, 2]"),
    ],
)
def test_what_cannot_work_is_one_line(words: list[str], complaint: str) -> None:
    done = run("generate", "x", *words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.startswith("quire: error: ")
    assert "Traceback" not in done.stderr


def test_an_adapter_answers(tmp_path: Path) -> None:
    spec = resolve(locate(from_flat({}))).spec
    adapter = write_adapter(tmp_path / "mine", spec, ["_proj"])
    asked = ("generate", "what is a block?", "--temperature", "0", "--max-tokens", "8")
    plain = run(*asked)
    by_path = run(*asked, "--lora", str(adapter))
    by_name = run(*asked, "--lora", "mine", "--lora-dir", str(tmp_path))
    assert by_path.returncode == by_name.returncode == 0, by_path.stderr + by_name.stderr
    assert by_path.stdout == by_name.stdout != plain.stdout
    for words in (("--lora", "absent"), ("--lora", "mine", "--url", "http://127.0.0.1:1")):
        wrong = run(*asked, *words)
        assert wrong.returncode == 2 and "--lora" in wrong.stderr, wrong.stderr

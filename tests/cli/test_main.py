"""The command itself: what it imports, how fast it answers, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from quire.cli.main import COMMANDS, main

SOURCE = Path(quire.__file__).parents[1]


def quire_command(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """`python -m quire WORDS`, from this checkout."""
    return subprocess.run(
        [sys.executable, "-m", "quire", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )


def imported_by(words: list[str]) -> set[str]:
    """Top-level modules in memory after `quire WORDS`."""
    code = (
        "import sys; from quire.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    heavy = {"torch", "fastapi", "pydantic", "numpy", "tokenizers", "zmq", "huggingface_hub"}
    assert not heavy & imported_by(words)


def test_help_names_every_command() -> None:
    text = quire_command("--help").stdout
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = quire_command(name, "--help")
    assert done.returncode == 0
    assert f"quire {name}" in done.stdout
    assert done.stderr == ""


def test_version() -> None:
    assert quire_command("--version").stdout == f"quire {quire.__version__}\n"


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "quire COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serv"], "quire: error: unknown command 'serv'. Did you mean serve?"),
        (["serve", "--port", "x"], "quire: error: port must be an integer, got 'x'."),
        (["serve", "--port", "70000"], "quire: error: port must be in [0, 65535], got 70000."),
        (["serve", "--dtype", "int4"], "quire: error: dtype must be one of"),
        (["serve", "--config", "/no/such"], "quire: error: config file /no/such cannot be read"),
    ],
)
def test_a_mistake_is_one_clean_line_and_exit_2(words: list[str], line: str) -> None:
    done = quire_command(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["serve", "--max-model-length", "4096"], "Did you mean --max-model-len?"),
        (["chat", "--max_modl_len=4096"], "Did you mean --max-model-len?"),
        (["serve", "--gpus", "2"], "unknown flag --gpus. ("),  # not --uds
        (["serve", "--temperature", "0"], "--override-generation-config '{\"temperature\": ...}'"),
        (
            ["serve", "--max-tokens", "9"],
            "--override-generation-config '{\"max_new_tokens\": ...}'",
        ),
        (["chat", "--top-q", "1"], "Did you mean --top-"),
    ],
)
def test_an_unknown_flag_is_answered_with_a_hint_that_helps_or_none(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["version"], ["-V"], ["--version"]])
def test_words_for_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    assert capsys.readouterr().out == f"quire {quire.__version__}\n"


def test_help_may_be_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["help", "chat"])
    assert left.value.code == 0
    assert "quire chat" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["help"])
    assert left.value.code == 0
    assert "quire COMMAND" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("words", [["--version"], ["serve", "--help"], ["collect-env"]])
def test_a_full_disk_under_the_output_is_one_line(words: list[str]) -> None:
    # Unbuffered, argparse itself swallows what cannot be written.
    env = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "quire", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=env,
        )
    assert done.returncode == 1
    assert done.stderr == "quire: error: cannot write: No space left on device.\n"

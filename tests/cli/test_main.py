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

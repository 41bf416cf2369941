"""The README's Python blocks run as printed, and every `quire` command line it shows would be accepted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quire.cli.main import COMMANDS
from quire.cli.serve import configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
SHELL = "\n".join(re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```$", README, re.M | re.S))
COMMAND_LINES = re.findall(r"^(?:\$ )?(quire .*)$", SHELL, re.M)
LOCAL_SERVER = re.compile(r"http://(?:127\.0\.0\.1|localhost):8000")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0][:40])
def test_python_block(block: str, request: pytest.FixtureRequest) -> None:
    if LOCAL_SERVER.search(block):
        block = LOCAL_SERVER.sub(request.getfixturevalue("demo_server").url, block)
    done = subprocess.run(
        [sys.executable, "-c", block],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_line(line: str) -> None:
    _, name, *rest = shlex.split(line, comments=True)
    assert name in COMMANDS or name in ("--help", "--version")
    if name == "serve":
        configs([word for word in rest if word != "&"])

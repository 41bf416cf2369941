"""Generated pages are what their generator would write today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quire.config import engine_options, server_options

ROOT = Path(__file__).parents[1]


def gen_docs(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gen_docs.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )


def test_the_options_page_is_up_to_date() -> None:
    done = gen_docs("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_options_page_names_every_flag() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for info in [*engine_options(), *server_options()]:
        assert f"`{info.flag}`" in page

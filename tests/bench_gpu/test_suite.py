"""One case's failure is its own, whatever it does to its process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from bench.gpu.__main__ import MODELS, PARTS, parse
from bench.gpu.suite import Options, run_part


def run(tmp_path: Path, module: str, seconds: float = 60.0, only: str = "") -> list[dict[str, Any]]:
    file = tmp_path / "gpu.json"
    file.write_text('{"entries": []}')
    options = Options(("qwen-0.6b",), "full", time.time() + seconds, only)
    run_part("fake", f"tests.bench_gpu.{module}", file, options)
    return json.loads(file.read_text())["entries"]


def test_the_rest_runs_after_a_failure_a_death_and_a_hang(tmp_path: Path) -> None:
    entries = run(tmp_path, "fakes")
    names = ["good", "raises", "after raising", "wrong", "dies", "hangs", "last"]
    assert [entry["name"] for entry in entries] == names
    assert [entry["status"] for entry in entries] == [
        "ok", "failed", "ok", "wrong", "lost", "lost", "ok",
    ]  # fmt: skip
    good, raised, after, wrong, _, hung, last = entries
    assert "ValueError: on purpose" in raised["error"] and "fakes.py" in raised["error"]
    assert wrong["values"]["error"] == {"x": 1.0}
    assert "took too long" in hung["error"]
    # An exception leaves the process, death and silence do not; a new one knows what the others found.
    assert good["values"]["pid"] == after["values"]["pid"] != last["values"]["pid"]
    assert last["values"]["seen"] == names
    assert {entry["part"] for entry in entries} == {"fake"}


def test_what_fails_comes_with_its_remedy(tmp_path: Path) -> None:
    entries = run(tmp_path, "fakes")
    remedies = {entry["name"]: entry.get("remedy") for entry in entries}
    assert remedies["raises"] == "raise it" and remedies["wrong"] == "right it"
    assert remedies["good"] is None


def test_cases_by_a_part_of_their_names(tmp_path: Path) -> None:
    entries = run(tmp_path, "fakes", only="good")
    assert [entry["name"] for entry in entries] == ["good"]


def test_a_part_that_cannot_begin(tmp_path: Path) -> None:
    (entry,) = run(tmp_path, "absent")
    assert (entry["name"], entry["status"]) == ("start", "failed")
    assert "a_package_that_nobody_has" in entry["error"]


def test_what_does_not_fit_into_the_time_is_skipped(tmp_path: Path) -> None:
    assert {entry["status"] for entry in run(tmp_path, "fakes", seconds=-1.0)} == {"skipped"}


def test_arguments() -> None:
    args = parse(["--out", "x"])
    assert args.parts == list(PARTS) and args.models == list(MODELS) and args.sizes == "full"
    args = parse(["profile", "check", "--out", "x", "--models", "llama-8b", "--quick"])
    assert args.parts == ["check", "profile"] and args.models == ["llama-8b"]
    assert args.sizes == "quick"
    args = parse(["first-hour", "--only", "kernels", "--out", "x"])
    assert args.parts == ["first-hour"] and args.only == "kernels"
    for words in (["nothing", "--out", "x"], ["check"], ["--out", "x", "--models", "gpt"]):
        with pytest.raises(SystemExit):
            parse(words)

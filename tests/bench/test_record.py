"""What a benchmark's JSON says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import quire
from quire.bench.record import command_line, run_record, versions


def test_a_record_is_json_and_has_every_fact() -> None:
    record = json.loads(json.dumps(run_record(["quire", "bench", "serve"])))
    assert set(record) == {
        "date", "commit", "dirty", "command", "machine", "versions", "environment",
    }  # fmt: skip
    assert record["command"] == "quire bench serve"
    assert record["machine"]["cpus_usable"] >= 1
    assert record["versions"]["quire"] == quire.__version__


def test_secrets_stay_out() -> None:
    words = ["quire", "--api-key", "s3cret", "t0p", "--model", "m", "--hf_token=s3cret", "x y"]
    line = command_line(words)
    assert "s3cret" not in line and "t0p" not in line
    assert line == "quire --api-key REDACTED REDACTED --model m --hf_token=REDACTED 'x y'"


def test_what_is_not_installed_has_no_version() -> None:
    assert versions(["no-such-package"])["no-such-package"] is None


def test_it_needs_the_standard_library_alone() -> None:
    code = "import sys, quire.bench.record; print(*{n.split('.')[0] for n in sys.modules})"
    source = str(Path(quire.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert "quire" in loaded and not loaded & {"torch", "numpy", "yaml", "msgspec"}

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cli import bench_grammar


def test_the_benchmark_reports_every_grammar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    argv = ["--num-tokens", "5", "--repeats", "1", "--output-json", str(file)]
    assert bench_grammar.run(argv) == 0
    shown = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["record"]["versions"]["llguidance"]
    cases = figures["grammars"]
    assert cases[0]["case"] == "vocabulary of 4096" and len(cases) == 9
    for case in cases[1:]:
        assert case["compile_ms"] > 0 and case["case"] in shown
        assert 0 < case["mask_p50_us"] <= case["mask_p99_us"] <= case["mask_max_us"]

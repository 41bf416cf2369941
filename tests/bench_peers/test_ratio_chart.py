"""The chart in the README is what its script makes of the committed results."""

from __future__ import annotations

import json

import pytest
from bench import ratio_chart
from bench.peers.report import MEASURES, compare


@pytest.fixture(scope="module")
def results() -> list[dict]:
    folder = ratio_chart.ROOT / "bench" / "results" / "cpu"
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in ratio_chart.RESULTS]


@pytest.mark.parametrize("scheme", ratio_chart.COLORS)
def test_the_committed_chart_is_up_to_date(results: list[dict], scheme: str) -> None:
    path = ratio_chart.ROOT / "docs" / "images" / f"ratios-{scheme}.svg"
    made = ratio_chart.chart(results, ratio_chart.COLORS[scheme])
    assert path.read_text(encoding="utf-8") == made, "run python -m bench.ratio_chart"


def test_every_ratio_is_in_the_chart_also_those_below_1(results: list[dict]) -> None:
    made = ratio_chart.chart(results, ratio_chart.COLORS["light"])
    shown = [m for m in MEASURES if (m.workload, m.key) in ratio_chart.ROWS]
    ratios = [compare(result, m) for m in shown for result in results]
    assert len(ratios) == 2 * len(ratio_chart.ROWS) and any(r and r.ratio < 1 for r in ratios)
    for found in ratios:
        assert found is not None and f"{found.ratio:.2f} \u00d7" in made

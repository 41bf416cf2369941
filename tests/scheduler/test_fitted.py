"""A fitted step time: its arithmetic, its file, and what the file may not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.plan.cost import StepTime
from quire.plan.fitted import FittedCost
from quire.scheduler.cost_model import Work

COST = FittedCost(
    (1.0, 8.0, 64.0),
    (0.010, 0.010, 0.066),
    row=1e-4,
    context=1e-6,
    prompt_context=1e-7,
    prompt_step=0.002,
    request_seconds=0.003,
    errors={"all": 0.04},
    about={"model": "M2"},
)


def test_a_step_is_its_curve_and_what_tokens_attend_to() -> None:
    predicts: StepTime = COST
    assert not predicts.is_bound
    assert COST.seconds(Work(4, 1000)) == pytest.approx(0.010 + 4e-4 + 1e-3)
    assert COST.seconds(Work(16, 0)) == pytest.approx(0.018 + 16e-4)
    mixed = Work(8, 800, 1.0, 24, 5000)
    assert COST.seconds(mixed) == pytest.approx(0.034 + 8e-4 + 8e-4 + 5e-4 + 0.002)
    assert COST.seconds(Work(0, 0, 1.0, 128, 0)) == pytest.approx(0.130 + 0.002), "continued"


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST.content()))
    found = FittedCost.load(path)
    assert found == COST and found.about == {"model": "M2"} and found.errors == {"all": 0.04}
    assert found.seconds(Work(20, 50)) == COST.seconds(Work(20, 50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quire_cost": 2}, "quire_cost: 1"),
        ({"curve": [0.01, 0.02]}, "same number"),
        ({"sizes": [1, 64, 8]}, "ascend"),
        ({"curve": [0.03, 0.02, 0.04]}, "never fall"),
        ({"curve": [0, 0, 0]}, "positive"),
        ({"curve": "fast"}, "list of numbers"),
        ({"curve": [0.01, "x", 1]}, "must be a number"),
        ({"row": -1e-3}, "row must be at least 0"),
        ({"row": float("nan")}, "row must be at least 0"),
        ({"context": True}, "context must be a number"),
        ({"colour": 1}, "unknown fields 'colour'"),
        ({"about": 3}, "objects"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST.content() | change))
    with pytest.raises(ConfigError, match=message) as caught:
        FittedCost.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    with pytest.raises(ConfigError, match="No such file"):
        FittedCost.load(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        FittedCost.load(path)
    path.write_text(json.dumps({"quire_cost": 1, "sizes": [1, 2], "curve": [1, 2]}))
    with pytest.raises(ConfigError, match="row, token_seconds are missing"):
        FittedCost.load(path)

"""Fitting the time of steps: the solver, that a law is found through noise, and the whole command."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quire.bench import fit_grid
from quire.bench.fit import errors, fit, nnls
from quire.bench.fit_grid import Cell
from quire.cli.main import main
from quire.errors import EngineError
from quire.plan.fitted import FittedCost
from quire.scheduler.cost_model import Work

Capture = pytest.CaptureFixture[str]


def law(work: Work) -> float:
    """Weights take 8 ms, and a token more computes longer from 12 on."""
    tokens = work.rows + work.prompt_tokens
    waited = max(0.008, 0.0007 * tokens) + 4e-7 * work.contexts + 1.5e-7 * work.prompt_contexts
    return waited + (0.002 if work.prompt_tokens else 0.0)


def cells(noise: float, seed: int = 0) -> list[Cell]:
    chance, found = random.Random(seed), []
    for rows in (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 64):
        for count in (0, 16, 64, 256, 1024) if rows else (16, 32, 64, 256, 1024):
            for context in (30, 500, 2000):
                attended = count * context + count * count / 2
                work = Work(rows, rows * context, 1.0, count, attended)
                kind = "prefill" if not rows else "mixed" if count else "decode"
                found.append(Cell(kind, work, law(work) * chance.lognormvariate(0.0, noise)))
    return found


def test_no_unknown_is_negative_and_what_is_left_over_is_least() -> None:
    """The conditions of Karush, Kuhn and Tucker, which only the solution meets."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        matrix, right = rng.normal(size=(20, 8)), rng.normal(size=20)
        x = nnls(matrix, right)
        gradient = matrix.T @ (right - matrix @ x)
        assert (x >= 0.0).all() and (gradient <= 1e-7).all()
        assert np.abs(gradient[x > 0.0]).max(initial=0.0) < 1e-7
    known = np.array([0.0, 2.0, 0.5])
    matrix = rng.uniform(size=(10, 3))
    assert nnls(matrix, matrix @ known) == pytest.approx(known)
    assert nnls(np.zeros((3, 2)), np.ones(3)).tolist() == [0.0, 0.0]


def test_a_law_is_found_through_noise() -> None:
    cost = fit(cells(0.05))
    assert set(cost.errors) == {"all", "decode", "mixed", "prefill"}
    assert 0.01 < cost.errors["all"] < 0.07
    assert errors(cost, cells(0.0, seed=1))["all"] < 0.04
    assert cost.seconds(Work(2, 60)) == pytest.approx(0.008, rel=0.07), "before the knee"
    assert cost.seconds(Work(60, 60 * 100)) == pytest.approx(0.0444, rel=0.07), "after it"


def test_the_error_is_that_of_steps_that_were_not_fitted() -> None:
    """A fit of as many unknowns as steps remembers times without a law, but not those held out."""
    held = own = 0.0
    for seed in range(6):
        chance = random.Random(seed)
        few = [replace(cell, seconds=chance.uniform(0.01, 0.1)) for cell in cells(0.0)]
        few = chance.sample(few, 30)
        cost = fit(few, seed=seed)
        held += cost.errors["all"]
        own += errors(cost, few)["all"]
    assert held > 1.3 * own


def test_a_few_steps_are_not_fitted() -> None:
    with pytest.raises(EngineError, match="too few"):
        fit(cells(0.0)[:20])


def test_cells_that_were_disturbed_count_little() -> None:
    disturbed = cells(0.01)
    for index in range(0, len(disturbed), 12):
        cell = disturbed[index]
        disturbed[index] = Cell(cell.kind, cell.work, 2 * cell.seconds)
    assert errors(fit(disturbed), cells(0.0))["all"] < 0.025


def test_the_command_measures_the_built_in_model(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_grid, "LEAST_SECONDS", 0.0)
    path, steps = tmp_path / "cost.json", tmp_path / "steps.json"
    words = ["--max-num-seqs", "8", "--max-model-len", "640", "--max-num-batched-tokens", "192"]
    assert main(["bench", "fit", "-o", str(path), "--output-json", str(steps), *words]) == 0
    shown = capsys.readouterr().out
    assert "Held out, the mean error is" in shown and "rows alone" in shown
    cost = FittedCost.load(path)
    assert 0.0 < cost.seconds(Work(1, 100)) < cost.seconds(Work(8, 800, 1.0, 128, 9000))
    about = cost.about
    assert (about["device"], about["max_num_seqs"]) == ("cpu", 8)
    assert {"model", "dtype", "threads", "commit", "versions", "machine", "command", "date"} <= set(
        about
    )
    kinds = {step["kind"] for step in json.loads(steps.read_text())["steps"]}
    assert kinds == {"decode", "prefill", "mixed"}

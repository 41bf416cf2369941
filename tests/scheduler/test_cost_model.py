"""The fit of a step's seconds: that it is found through noise, stays positive, and follows what lasts."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from quire.messages import PlannedRow, StepPlan
from quire.scheduler.cost_model import CHANGE, CostModel, Work, work_of

TRUE = Work(rows=1.3e-3, contexts=2e-7, constant=5e-3, prompt_tokens=3.7e-4, prompt_contexts=1.5e-7)


def seconds_of(work: Work, true: Work = TRUE) -> float:
    return sum(a * b for a, b in zip(work, true, strict=True))


def decoding(rows: int, context: int) -> Work:
    return Work(rows, rows * context)


def mixed(rows: int, context: int, count: int, start: int) -> Work:
    return Work(rows, rows * context, 1.0, count, count * start + count * count / 2)


def steps(seed: int = 0) -> Iterator[Work]:
    """Batches that change slowly, and prompts in chunks of various sizes."""
    chance = random.Random(seed)
    start = 0
    for step in range(400):
        rows = 4 + step // 50
        if step % 3:
            yield decoding(rows, 200 + step)
        else:
            count = chance.choice([32, 64, 300])
            yield mixed(rows, 200 + step, count, start)
            start = (start + count) % 16_000


def fitted(noise: float = 0.1, seed: int = 0) -> CostModel:
    model, chance = CostModel(), random.Random(seed)
    for work in steps(seed):
        model.observe(work, seconds_of(work) * chance.lognormvariate(0.0, noise))
    return model


def test_work_counts_rows_prompts_and_what_they_attend_to() -> None:
    rows = [
        PlannedRow(request_id=1, start=100, num_tokens=1, samples=1),
        PlannedRow(request_id=2, start=50, num_tokens=3, samples=3, draft_token_ids=(1, 2)),
        PlannedRow(request_id=3, start=1000, num_tokens=16, samples=0),
    ]
    assert work_of(rows) == Work(4, 250, 1.0, 16, 16_128)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_unlike_those_before_it_is_predicted_through_noise(seed: int) -> None:
    model = fitted(seed=seed)
    for work in (decoding(6, 500), mixed(8, 500, 128, 8000), mixed(10, 600, 512, 500)):
        assert model.seconds(work) == pytest.approx(seconds_of(work), rel=0.1)
    assert model.spread == pytest.approx(0.08, abs=0.03)


def test_without_noise_it_is_exact() -> None:
    model = fitted(noise=0.0)
    work = mixed(9, 550, 200, 4000)
    assert model.seconds(work) == pytest.approx(seconds_of(work), rel=0.01)


def test_it_is_deterministic() -> None:
    assert fitted().coefficients == fitted().coefficients


def test_nothing_is_known_before_the_first_step_and_something_after_it() -> None:
    model = CostModel()
    assert model.seconds(mixed(1, 1, 16, 0)) == 0.0 and not model.knows_prompts
    model.observe(mixed(0, 0, 64, 0), 0.02)
    assert model.seconds(mixed(0, 0, 64, 0)) == pytest.approx(0.02, rel=0.01)
    assert model.knows_prompts


def test_coefficients_are_never_negative() -> None:
    """Steps that take less with more rows were disturbed."""
    model, chance = CostModel(), random.Random(3)
    for step in range(500):
        rows = chance.randrange(1, 30)
        work = decoding(rows, 100) if step % 2 else mixed(rows, 100, 10 * rows, 50)
        model.observe(work, 0.05 / rows * chance.uniform(0.2, 3.0))
        assert min(model.coefficients) >= 0.0
    assert model.seconds(decoding(30, 100)) >= model.seconds(decoding(1, 100)) > 0.0


def test_an_outlier_weighs_little_and_a_change_that_lasts_is_learned() -> None:
    model = fitted(noise=0.02)
    work = mixed(8, 500, 128, 2000)
    before = model.seconds(work)
    model.observe(work, 5 * before)
    assert model.seconds(work) == pytest.approx(before, rel=0.05)
    for _ in range(CHANGE + 9):
        model.observe(work, 5 * before)
    assert model.seconds(work) == pytest.approx(5 * before, rel=0.2)
    for _ in range(CHANGE + 9):
        model.observe(work, before)
    assert model.seconds(work) == pytest.approx(before, rel=0.2)


def test_prompts_are_not_forgotten_while_there_are_none() -> None:
    model = fitted()
    work = mixed(8, 500, 128, 2000)
    chance = random.Random(5)
    for step in range(20_000):
        alone = decoding(8, 200 + step % 1000)
        model.observe(alone, seconds_of(alone) * chance.lognormvariate(0.0, 0.1))
    assert model.seconds(work) == pytest.approx(seconds_of(work), rel=0.1)
    model.observe(work, seconds_of(work) * 1.3)
    assert model.seconds(work) == pytest.approx(seconds_of(work), rel=0.15), "one step is one step"


def test_a_start_from_a_known_device_predicts_the_first_steps_and_is_learned_further() -> None:
    model = CostModel()
    model.start(seconds_of, rows=64, tokens=2048)
    works = (decoding(1, 100), decoding(64, 500), mixed(8, 500, 512, 1000), mixed(0, 0, 1024, 0))
    for work in works:
        assert model.seconds(work) == pytest.approx(seconds_of(work), rel=0.05)
    assert model.knows_prompts and model.num_steps > 0 and model.spread < 0.1
    assert model.prompt_seconds(400, 2000) == pytest.approx(400 * (3.7e-4 + 2200 * 1.5e-7), rel=0.1)
    slow = Work(*(2 * each for each in TRUE))
    for work in steps():
        model.observe(work, seconds_of(work, slow))
    assert model.seconds(mixed(8, 500, 128, 8000)) == pytest.approx(
        2 * seconds_of(mixed(8, 500, 128, 8000)), rel=0.1
    )


def test_such_a_start_knows_the_knee() -> None:
    model = CostModel()
    model.start(lambda work: max(0.01, 0.001 * work.rows), rows=64, tokens=2048)
    sizes = (1, 4, 8, 16, 64)
    assert [model.sampling.seconds(n) for n in sizes] == pytest.approx(
        [0.01, 0.01, 0.01, 0.016, 0.064]
    )
    assert model.sampling.knows(16)


def test_many_equal_steps_at_once_are_as_one_after_the_other() -> None:
    """For a simulator that jumps: also in which steps are measured at all."""
    chance = random.Random(2)
    seconds = [0.01 * chance.lognormvariate(0.0, 0.1) for _ in range(700)]
    one, many = CostModel(), CostModel()
    for step, each in enumerate(seconds):
        rows = [
            PlannedRow(request_id=i, start=50 + step, num_tokens=1, samples=1) for i in range(3)
        ]
        one.measure(StepPlan(step_id=step, rows=rows), each)
    for first in (0, 300):
        part = seconds[first : first + 300] if not first else seconds[300:]
        many.repeat(3, 3 * (50 + first), part)
    assert one.coefficients == many.coefficients and one.predicted == many.predicted
    assert one.num_steps == many.num_steps == 256 + 111

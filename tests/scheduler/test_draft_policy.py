"""How many drafts: near the best number, never much slower than none. Time is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from quire.messages import SampledRow, StepResult
from quire.scheduler.draft_policy import DraftPolicy
from quire.scheduler.request import Request
from quire.scheduler.step_cost import StepCost
from tests.scheduler.requests import add_request
from tests.scheduler.simulated import Cost, Simulation, knee

LINEAR = knee(1)


def best(cost: Cost, right: float, rows: int, propose: float) -> float:
    """Tokens per second with the best fixed number of drafts."""
    return max(
        rows * sum(right**n for n in range(k + 1)) / (cost(rows * (1 + k)) + propose * k * rows)
        for k in range(8)
    )


@pytest.mark.parametrize(
    ("cost", "right", "rows", "propose", "share"),
    [
        (knee(8), 0.9, 1, 0.0, 0.9),
        (knee(8), 0.8, 1, 0.002, 0.85),
        (knee(8), 0.3, 1, 0.002, 0.9),
        (knee(8), 0.8, 4, 0.0, 0.85),
        (knee(8), 0.6, 16, 0.0, 0.97),
        (knee(1.5), 0.8, 1, 0.002, 0.85),
        (knee(32), 0.8, 4, 0.0, 0.85),
        (knee(32), 0.6, 16, 0.0, 0.85),
        (LINEAR, 0.95, 1, 0.0, 0.97),
        (LINEAR, 0.95, 16, 0.002, 0.97),
        (knee(8), 0.0, 1, 0.002, 0.97),
        (knee(8), 0.0, 4, 0.0, 0.97),
    ],
)
def test_near_the_best_number_and_never_much_slower_than_none(
    cost: Cost, right: float, rows: int, propose: float, share: float
) -> None:
    simulation = Simulation(cost, right, rows=rows, propose=propose, noise=0.05)
    off = rows / cost(rows)
    assert simulation.run(300) > 0.96 * off
    assert simulation.run(500) > max(0.97 * off, share * best(cost, right, rows, propose))


def test_a_large_batch_proposes_almost_nothing() -> None:
    """Mostly; noise makes a probe look good now and then."""
    shares, speeds = [], []
    for seed in range(9):
        simulation = Simulation(knee(8), 0.9, rows=64, propose=0.001, seed=seed)
        speeds.append(simulation.run(300) / (64 / simulation.cost(64)))
        shares.append(simulation.num_drafts / (64 * 300))
    assert sum(speeds) / len(speeds) > 0.97
    assert sorted(shares)[4] < 0.005


def test_a_change_is_noticed() -> None:
    simulation = Simulation(knee(8), 0.0, propose=0.001, noise=0.02)
    off = 1 / simulation.cost(1)
    assert simulation.run(400) < off
    simulation.right = 0.95
    simulation.run(300)
    assert simulation.run(200) > 2 * off
    simulation.right = 0.0
    simulation.run(20)
    assert simulation.run(300) > 0.97 * off
    simulation.right, simulation.cost = 0.8, LINEAR
    simulation.run(800)
    assert simulation.run(300) > 0.97 / simulation.cost(1)


def test_one_request_that_copies_is_drafted_among_others() -> None:
    """Slots go to the requests whose drafts are right."""
    simulation = Simulation(knee(8), 0.0, rows=4)
    requests = list(simulation.scheduler.running) or list(simulation.scheduler.waiting)
    simulation.run(40)
    policy = simulation.scheduler.drafting.policy
    for _ in range(10):
        policy.learn(requests[2], 3, 3)
    counts = policy.ask(requests, [7] * 4)
    assert counts[2] >= 3 and counts[0] + counts[1] + counts[3] <= 1


def test_drafts_beside_a_long_prompt_are_judged_by_what_a_token_costs_there() -> None:
    simulation = Simulation(knee(8), 0.9, rows=1, noise=0.0)
    simulation.run(200)
    policy = simulation.scheduler.drafting.policy
    [request] = simulation.scheduler.running
    policy.costs.coefficients[3:] = [0.0001, 0.0]
    assert policy.grant([request], [7], 1, True) == [7]
    policy.costs.coefficients[3:] = [0.02, 0.0]
    assert policy.grant([request], [7], 1, True) == [0]


def test_the_time_of_a_step_is_learned_between_sizes_and_follows_the_level() -> None:
    cost, truth = StepCost(), knee(8)
    assert cost.seconds(3) == 0.0 and not cost.knows(1)
    for _ in range(50):
        for size in (1, 4, 12):
            cost.observe(size, truth(size))
    assert cost.knows(1) and cost.knows(5) and not cost.knows(40)
    assert [cost.seconds(n) / truth(n) for n in (1, 2, 4, 12)] == pytest.approx([1] * 4)
    assert cost.seconds(4) < cost.seconds(8) < cost.seconds(12) < cost.seconds(16)
    for _ in range(50):
        cost.observe(4, 3 * truth(4))  # all contexts have become longer
    assert cost.seconds(4) == pytest.approx(3 * truth(4), rel=0.02)
    assert cost.seconds(12) == pytest.approx(3 * truth(12), rel=0.2)
    before = cost.seconds(4)
    cost.observe(4, 100.0)
    assert cost.seconds(4) < 1.2 * before, "one step that waited says little"


def test_sizes_rise() -> None:
    cost = StepCost()
    for size in (1, 2, 16, 100):
        cost.observe(size, 0.01 * size)
    seconds = [cost.seconds(n) for n in range(1, 130)]
    assert all(one <= other * 1.0001 for one, other in pairwise(seconds))
    assert seconds[99] == pytest.approx(1.0, rel=0.1)


def test_acceptance_begins_as_the_drafters() -> None:
    simulation = Simulation(knee(8), 0.9)
    simulation.run(300)
    policy = simulation.scheduler.drafting.policy
    fresh = Request(add_request(5, [1], max_tokens=5), queued_time=0.0)
    assert policy.acceptance(fresh) == pytest.approx(0.9, abs=0.08)
    policy.learn(fresh, 4, 0)
    assert policy.acceptance(fresh) < 0.65


def test_a_right_draft_ends_the_rest() -> None:
    simulation = Simulation(knee(1), 0.0, noise=0.0)
    simulation.run(100)
    policy = simulation.scheduler.drafting.policy
    [request] = simulation.scheduler.running
    while not policy.rests(1):
        simulation.run(1)
    policy.learn(request, 2, 1)
    assert not policy.rests(1)


class AsksOnce(DraftPolicy):
    """Asks one request in the first step, then rests, and would rather measure nothing."""

    asked = False

    def rests(self, num_rows: int) -> bool:
        return self.asked

    def skips(self, seconds: float) -> bool:
        return True

    def ask(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[int]:
        self.asked = True
        return [2] + [0] * (len(limits) - 1)


def test_a_request_that_was_asked_is_held_until_its_result_and_no_longer() -> None:
    """With plans in flight, a later one may rest before the one that asked is done."""
    scheduler = Simulation(knee(8), 0.0, rows=2).scheduler
    scheduler.drafting.policy = AsksOnce()
    first = scheduler.schedule()
    assert [row.num_drafts for row in first.rows] == [2, 0]
    assert [row.request_id for row in scheduler.schedule().rows] == [1], "0 waits for its drafts"
    sampled = [SampledRow(request_id=row.request_id, token_ids=[5]) for row in first.rows]
    scheduler.update(first, StepResult(step_id=first.step_id, sampled=sampled))
    for _ in range(2):  # the second computes a pending token
        assert 0 in [row.request_id for row in scheduler.schedule().rows]

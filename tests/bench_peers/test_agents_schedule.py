"""The simulated W6: every turn runs, costs are what the rows say, and half the costs is less time."""

from __future__ import annotations

import pytest
from bench.agents_schedule import Costs, figures, new_scheduler, simulate
from bench.peers import agents

from quire.messages import PlannedRow


def row(start: int, num_tokens: int) -> PlannedRow:
    return PlannedRow(request_id=1, start=start, num_tokens=num_tokens, new_block_ids=(), samples=1)


def test_the_cost_of_a_step() -> None:
    costs = Costs(step=10.0, token=3.0, key=2.0, row=5.0, decode_key=0.5)
    assert costs.seconds([]) == pytest.approx(10e-6)
    assert costs.seconds([row(8, 4)]) == pytest.approx((10 + 4 * (3 + 2 * 10)) * 1e-6)
    assert costs.seconds([row(8, 1), row(6, 1)]) == pytest.approx((10 + 5 + 4 + 5 + 3) * 1e-6)


def test_all_turns_run_and_cheaper_steps_make_a_faster_server() -> None:
    def run(costs: Costs) -> dict[str, float]:
        turns = simulate(agents.SMOKE, new_scheduler(256), costs, seed=0)
        assert sorted((t.session.number, t.turn) for t in turns) == [
            (session, turn) for session in range(2) for turn in range(3)
        ]
        asked = [t.session.turns[t.turn].output_len for t in turns]
        assert [len(t.times) for t in turns] == asked
        return figures(turns)

    slow, fast = run(Costs()), run(Costs(step=4000.0, token=285.0))
    assert fast["tok_s"] > slow["tok_s"] and fast["seconds"] < slow["seconds"]
    assert run(Costs()) == slow

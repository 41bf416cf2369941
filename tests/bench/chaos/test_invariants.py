"""Each invariant is silent about a good server, and finds a planted violation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.bench.chaos.invariants import (
    BLOCK_GAUGES,
    IDLE_GAUGES,
    INVARIANTS,
    SHOWN,
    Evidence,
    is_settled,
    violations,
)
from quire.bench.chaos.metrics import Metrics, read_metrics
from quire.bench.chaos.wire import Choice, Kind, Outcome

ANSWER = (Choice("so it is", (1, 2, 3), "length"),)
GAUGES = (*BLOCK_GAUGES, *IDLE_GAUGES)


def metrics(**changed: float) -> Metrics:
    values = dict.fromkeys(GAUGES, 0.0) | changed
    return read_metrics("\n".join(f'{name}{{a="b"}} {value}' for name, value in values.items()))


def good() -> Evidence:
    return Evidence(
        outcomes=[Outcome("a", Kind.ANSWER, 200, answer=ANSWER)],
        answers={"a": ANSWER},
        metrics=metrics(),
        statuses={"/health": 200, "/ready": 200},
        roles={"core": 1, "worker": 1, "other": 3},
        expected_roles={"core": 1, "worker": 1},
    )


def broken_by(evidence: Evidence) -> list[str]:
    """The names of the invariants that do not hold."""
    return [name for name, holds in INVARIANTS.items() if holds(evidence)]


def test_a_good_server():
    assert violations(good()) == []
    assert is_settled(good())


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.ANSWER])
def test_an_end_that_no_fault_explains(kind):
    evidence = replace(good(), outcomes=[*good().outcomes, Outcome("a", kind, 500)])
    assert broken_by(evidence) == ["ended once"]
    assert broken_by(replace(evidence, tolerates={kind})) == []


@pytest.mark.parametrize(
    "other",
    [
        (Choice("so it is", (1, 2, 4), "length"),),
        (Choice("so it was", (1, 2, 3), "length"),),
        (Choice("so it is", (1, 2, 3), "stop"),),
        (Choice("so it is", (1, 2), "length"),),
        (*ANSWER, *ANSWER),
        (),
        None,
    ],
)
def test_another_answer(other):
    evidence = replace(good(), outcomes=[Outcome("a", Kind.ANSWER, 200, answer=other)])
    assert broken_by(evidence) == ["answers equal"]


def test_an_answer_that_is_not_known_is_not_compared():
    evidence = replace(good(), outcomes=[Outcome("fresh", Kind.ANSWER, 200, answer=ANSWER)])
    assert broken_by(evidence) == []


@pytest.mark.parametrize("name", GAUGES)
def test_a_gauge_above_zero(name):
    evidence = replace(good(), metrics=metrics(**{name: 0.5}))
    assert broken_by(evidence) == ["blocks free" if name in BLOCK_GAUGES else "gauges zero"]
    assert not is_settled(evidence)


def test_a_gauge_that_is_gone():
    """A renamed metric must not make an invariant hold for ever."""
    few = Metrics({key: 0.0 for key in metrics().values if key[0] != BLOCK_GAUGES[1]})
    assert broken_by(replace(good(), metrics=few)) == ["blocks free"]


def test_no_metrics():
    assert broken_by(replace(good(), metrics=None)) == ["blocks free", "gauges zero"]


@pytest.mark.parametrize(
    "changed",
    [
        {"exit_status": 0},
        {"exit_status": 1, "metrics": None},
        {"statuses": {"/health": 503, "/ready": 200}},
        {"statuses": {"/health": 200, "/ready": 0}},
        {"roles": {"core": 1}},
        {"roles": {"core": 1, "worker": 2}},
        {"zombies": [17]},
    ],
)
def test_a_server_that_is_not_well(changed):
    assert broken_by(replace(good(), **changed)) == ["server well"]


def test_many_violations_are_counted_and_few_are_shown():
    outcomes = [Outcome(f"call-{n}", Kind.STUCK) for n in range(40)]
    found = violations(replace(good(), outcomes=outcomes))
    assert len(found) == SHOWN + 1
    assert found[-1].endswith(f"and {40 - SHOWN} more")

"""Timelines are valid trace events, and say what happened."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import pytest

from quire.scheduler.history import History
from quire.scheduler.lives import lives
from quire.scheduler.timeline import phases, recent, timeline
from tests.scheduler.observed import Observed
from tests.scheduler.test_lives import random_run
from tests.scheduler.trace_rules import check_trace


def of(trace: dict, ph: str, **fields: object) -> list[dict]:
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == ph and fields.items() <= event.items()
    ]


def drawn(*engines: Observed, **options: object) -> dict:
    trace = timeline([engine.history() for engine in engines], **options)
    check_trace(trace)
    return json.loads(msgspec.json.encode(trace))


def test_random_runs_follow_the_rules() -> None:
    flows = preemptions = tracks = 0
    for seed in range(30):
        engine = random_run(seed)
        trace = drawn(engine)
        drawn(engine, seconds=0.2)
        flows += len(of(trace, "s"))
        preemptions += len(of(trace, "i"))
        tracks = max([tracks, *(event["tid"] for event in of(trace, "X"))])
        found = lives(engine.history())
        for life in found.values():
            spans = phases(life, engine.now)
            assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert flows > 20 and preemptions > 5 and tracks == 2


def test_what_is_drawn() -> None:
    engine = Observed(num_blocks=9, budget=64, longest=32)
    engine.add(1, 15, 8)
    engine.add(2, 15, 8)
    engine.drain()
    trace = drawn(engine)
    spans = [(e["name"], e["ts"]) for e in of(trace, "b", id="r2")]
    assert [name for name, _ in spans] == [
        "r2",
        "prefill",
        "decode",
        "preempted",
        "recompute",
        "decode",
    ]
    (victim,) = of(trace, "i")
    assert victim["name"] == "r2 preempted for r1" and victim["ts"] == spans[3][1]
    steps = of(trace, "X")
    assert len(steps) == len(engine.steps) and steps[0]["name"] == "30 of prompts"
    assert steps[0]["dur"] == pytest.approx(40e3, abs=1)
    assert steps[0]["args"]["largest"] == {"r1": 15, "r2": 15}
    (arrow,) = of(trace, "s")
    assert arrow["name"] == "r2: no free blocks"
    queue = [event["args"] for event in of(trace, "C", name="requests")]
    assert {"waiting": 1, "running": 1} in queue
    assert max(event["args"]["used"] for event in of(trace, "C", name="KV blocks")) == 8
    assert trace["otherData"]["start"].startswith("2023-11-14T22:15:00")


def test_replicas_have_one_clock_and_steps_in_flight_a_track_of_their_own() -> None:
    first, second = Observed(depth=2), Observed()
    second.now += 1.0
    for engine in (first, second):
        engine.add(1, 20)
        engine.drain()
    trace = drawn(first, second)
    names = [event["args"]["name"] for event in of(trace, "M")]
    assert names == ["replica 0", "steps", "steps in flight", "replica 1", "steps"]
    assert min(e["ts"] for e in of(trace, "X", pid=2)) == pytest.approx(1e6)
    assert {e["tid"] for e in of(trace, "X", pid=1)} == {1, 2}


def test_the_last_seconds_and_nothing() -> None:
    engine = random_run(3)
    last = recent(engine.history(), 0.1)
    assert 0 < len(last.steps) < len(engine.steps)
    assert last.steps[-1].planned - last.steps[0].planned <= 0.1
    assert recent(engine.history(), None) == engine.history()
    assert timeline([History()])["traceEvents"] == [
        {"ph": "M", "pid": 1, "tid": 0, "ts": 0, "name": "process_name", "args": {"name": "quire"}}
    ]

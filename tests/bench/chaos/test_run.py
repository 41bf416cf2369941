"""A real server: what a run does is in its report, and so is a violation that is planted."""

from __future__ import annotations

import json
import os
import signal

import pytest

from quire.bench.chaos import run
from quire.bench.chaos.faults import FAULTS, Fault, Struck
from quire.bench.chaos.options import ChaosOptions
from quire.bench.chaos.run import run_chaos

SEED = 2
"""Strikes with the wrong answers first."""


class KillFrontEnd(Fault):
    """What no server survives."""

    name = "kill-front-end"

    async def strike(self, site, draw):
        (pid,) = site.server.pids("front end")
        os.kill(pid, signal.SIGKILL)
        return Struck({"pid": pid})


class WrongAnswers(Fault):
    """An answer that differs by what was asked: as if the engine had mixed up two requests."""

    name = "wrong-answers"

    async def strike(self, site, draw):
        one, other = site.small[:2]
        object.__setattr__(one, "body", other.body)
        object.__setattr__(one, "path", other.path)
        object.__setattr__(one, "stream", other.stream)
        await site.load.send_all([one])
        return Struck()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_planted_violations_are_found_and_the_run_goes_on(tmp_path, monkeypatch):
    planted = (WrongAnswers, KillFrontEnd)
    for fault in planted:
        monkeypatch.setitem(FAULTS, fault.name, fault)
    monkeypatch.setattr(run, "GIVE_UP_EXITS", 1)  # ends the run after the second
    names = tuple(fault.name for fault in planted)
    options = ChaosOptions(seconds=600, seed=SEED, faults=names, concurrency=2)
    lines: list[str] = []
    report = await run_chaos(options, tmp_path, lines.append)
    assert [strike.fault for strike in report.strikes] == [
        "none",
        "wrong-answers",
        "kill-front-end",
    ]
    found = report.violations
    assert [text for text in found if text.startswith("wrong-answers: answers equal: small-0")]
    assert "kill-front-end: server well: the server exited with -9" in found
    assert not [text for text in found if text.startswith("none")]
    assert report.requests["answer"] > 40
    content = json.loads(json.dumps(report.as_json()))
    assert content["violations"] == found
    assert content["faults"]["wrong-answers"]["violations"] >= 1
    text = report.as_text()
    assert f"{len(found)} violations" in text and "VIOLATION" in text

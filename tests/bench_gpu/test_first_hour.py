"""The first hour: its order, its remedies, and that nothing is timed before it is compared."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from bench.gpu import first_hour
from bench.gpu.__main__ import MODELS
from bench.gpu.roofline import ASSUMED
from bench.gpu.suite import Options

from quire.kernels.triton import attention
from quire.kernels.triton.tuning import CANDIDATES


def names() -> list[str]:
    return [case.name for case in first_hour.cases(Options(MODELS, "full", 0.0), [])]


def test_checks_come_before_times() -> None:
    order = ["kernels", "engine", "memcheck", "time", "profile"]
    kinds = [name.split(":")[0] for name in names()]
    assert kinds == sorted(kinds, key=order.index) and set(kinds) == set(order)
    assert len(set(names())) == len(names())


def test_every_step_says_what_to_do_when_it_fails() -> None:
    for case in first_hour.cases(Options(MODELS, "full", 0.0), []):
        assert case.remedy, case.name


def test_what_the_issue_names_is_in_it() -> None:
    found = " ".join(names())
    for wanted in (
        "quantized",
        "speculative",
        "adapter",
        "two ranks",
        "sleep",
        "graphs",
        "no waits",
    ):
        assert wanted in found


class Step:
    """A batch whose result is off by so much."""

    queries = (1,)

    def __init__(self, off: float) -> None:
        self.off = off
        self.cache = type("Cache", (), {"k": torch.zeros(1, dtype=torch.bfloat16)})()

    def attend(self) -> object:
        if self.off > 9:
            raise RuntimeError("out of resources")
        return lambda: torch.full((1, 2, 4), 1.0 + self.off)

    def part(self, request: int, first: int, last: int) -> Step:
        return self

    def expected(self, request: int) -> torch.Tensor:
        return torch.ones(1, 2, 4)


@pytest.mark.parametrize(("off", "timed"), [(0.0, True), (0.5, False), (10.0, False)])
def test_a_wrong_result_is_not_timed(
    off: float, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_hour, "seconds", lambda calls: 1e-3)
    values = first_hour._timed([Step(off)], 1e6, 0.0, ASSUMED, None, "decode")  # type: ignore[list-item]
    assert ("us" in values) == timed and values.get("right", True) == timed


def test_a_candidate_is_used_and_put_back() -> None:
    before = attention.tile
    key = type("Key", (), {"regime": "decode"})()
    with pytest.raises(ValueError, match="stop"), first_hour.using(CANDIDATES["decode"][0]):
        assert attention.tile(key) is CANDIDATES["decode"][0]
        raise ValueError("stop")
    assert attention.tile is before

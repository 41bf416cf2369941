"""The first hour: its order, its remedies, and that nothing is timed before it is compared."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("triton")

import torch
from bench.gpu import check, engines, first_hour
from bench.gpu.__main__ import MODELS
from bench.gpu.roofline import ASSUMED
from bench.gpu.suite import Options

from quire.kernels.triton import attention
from quire.kernels.triton.tuning import CANDIDATES
from quire.messages import TokenLogprobs


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
        "two in one process",
        "profile",
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


def test_the_engine_has_its_turn_whatever_hangs_before() -> None:
    """In ten minutes, less what it takes to start. The two profiles are last: theirs is the time that is
    left."""
    steps = first_hour.cases(Options(MODELS, "full", 0.0), [])
    last = next(i for i, case in enumerate(steps) if case.name == "engine: two in one process")
    found = {case.name for case in steps[: last + 1]}
    assert {"engine: graphs", "engine: no waits"} <= found
    assert sum(case.limit_s for case in steps[: last + 1]) <= 570


def test_a_launch_that_waits_is_named() -> None:
    def launch(step: int) -> int:
        if step == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return step

    watched = first_hour.Watched(launch)
    assert [watched(step) for step in range(3)] == [0, 1, 2] and watched.steps == 3
    [said] = watched.waits
    assert said.startswith("test_first_hour.py:") and "synchronizing" in said


def test_pytorch_is_asked_to_report_waits_only_while_a_step_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(first_hour, "DEVICE", torch.device("cuda"))

    def fails() -> None:
        modes.append("launch")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        first_hour.Watched(fails)()
    assert modes == ["warn", "launch", "default"]


def driven(token: int, logprob: float) -> engines.Driven:
    entry = TokenLogprobs(token_id=token, logprob=logprob, rank=1, top_ids=[], top_logprobs=[])
    return engines.Driven(tokens={0: [token]}, logprobs={0: [entry]})


@pytest.mark.parametrize(
    ("runs", "recorded", "ok"),
    [
        ([(1, -0.5), (1, -0.5), (1, -0.5)], 3, True),
        ([(1, -0.5), (1, -0.5), (1, -0.25)], 3, False),
        ([(1, -0.5), (2, -0.5), (1, -0.5)], 3, False),
        ([(1, -0.5), (1, -0.5), (1, -0.5)], 0, False),
    ],
)
def test_graphs_are_right_if_every_bit_is_that_of_eager_steps(
    runs: list[tuple[int, float]], recorded: int, ok: bool
) -> None:
    assert check.compared([driven(*run) for run in runs], recorded)["ok"] is ok


@pytest.mark.parametrize(
    ("first", "second", "after", "ok"),
    [
        ([1], [1], [1], {"ok": True, "alone": True, "after": True}),
        ([1], [1], [2], {"ok": False, "alone": True, "after": False}),
        ([1], [2], [2], {"ok": False, "alone": False, "after": True}),
    ],
)
def test_two_engines_say_when_they_differ(
    first: list[int], second: list[int], after: list[int], ok: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The tokens of the first, the second, and the second after the first was closed."""
    closed: list[int] = []

    class Core:
        def __init__(self, number: int) -> None:
            self.executor = type("Executor", (), {"close": lambda own: closed.append(number)})()
            self.tokens = [[first], [second, after]][number]

        def prepare(self) -> bool:
            return False

    cores = iter([Core(0), Core(1)])
    monkeypatch.setattr(check, "_checkpoint", lambda folder, small: None)
    monkeypatch.setattr(engines, "build", lambda *arguments, **options: next(cores))
    monkeypatch.setattr(first_hour, "_tokens", lambda core, spec, small: core.tokens.pop(0))
    assert first_hour.two_engines(small=True) == ok
    assert closed == [0]

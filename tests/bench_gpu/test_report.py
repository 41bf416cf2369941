"""The markdown, from made-up results."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from bench.gpu.__main__ import MODELS, PARTS
from bench.gpu.profile import summarize
from bench.gpu.report import FIGURES, Figure, markdown, value_of
from bench.gpu.suite import Options


def entry(part: str, name: str, status: str = "ok", **values: Any) -> dict[str, Any]:
    return {
        "part": part,
        "name": name,
        "status": status,
        "seconds": 1.0,
        "values": values,
        "error": "Traceback\nValueError: no | luck" if status == "failed" else None,
    }


def results(*entries: dict[str, Any], sizes: str = "full") -> dict[str, Any]:
    return {
        "record": {
            "date": "2026-11-21T12:00:00+00:00",
            "commit": None,
            "command": "python -m bench.gpu",
            "versions": {"torch": "2.11.0", "msgspec": None},
        },
        "note": "commit 0123",
        "sizes": sizes,
        "entries": list(entries),
    }


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_figures_are_compared_with_what_was_asked() -> None:
    figure = FIGURES[0]
    part, case, *keys = figure.path
    values: Any = figure.asked * (0.9 if figure.lower else 1.1)
    for key in reversed(keys):
        values = {key: values}
    page = markdown(results(entry(part, case, **values)))
    reached = [line for line in lines(page) if line.startswith(f"| {figure.title} ")]
    assert len(reached) == 1 and reached[0].endswith("| yes |")
    missing = [line for line in lines(page) if line.endswith("| not measured |")]
    assert len(missing) == len(FIGURES) - 1
    assert Figure("t", (), 5.0).reached(5.0) and not Figure("t", (), 5.0).reached(4.9)
    assert Figure("t", (), 5.0, lower=True).reached(4.9)
    assert not Figure("t", (), 5.0, lower=True).reached(5.1)


def test_every_figure_is_of_a_case_that_there_is() -> None:
    pytest.importorskip("triton")
    options = Options(MODELS, "full", 0.0)
    cases = {
        (part, case.name)
        for part in PARTS
        for case in importlib.import_module(f"bench.gpu.{part}").cases(options, [])
    }
    assert {figure.path[:2] for figure in FIGURES} <= cases


def test_value_of() -> None:
    found = results(entry("kernels", "case", **{"1 x 1024": {"share": 0.9}}), entry("engine", "b"))
    assert value_of(found, ("kernels", "case", "1 x 1024", "share")) == 0.9
    assert value_of(found, ("kernels", "case", "2 x 1024", "share")) is None
    assert value_of(found, ("engine", "b", "tok_s")) is None
    assert value_of(found, ("engine", "c", "tok_s")) is None


def test_the_page() -> None:
    page = markdown(
        results(
            entry("machine", "ceilings", bytes_per_s=4.3e12, flops_per_s=7.8e14),
            entry("machine", "facts", device="NVIDIA H200"),
            entry("check", "attention", error={"a": 0.001, "b": 0.0042}, same={"alone": True}),
            entry("check", "sampling", "wrong", ok=False, error={"a": 7.0}),
            entry("check", "layers", "failed"),
            entry("kernels", "decode", **{"1 x 1024": {"us": 12.34, "sdpa_error": "none"}}),
            entry("engine", "8b decode", tok_s=12345.6, complete=True),
            entry("profile", "8b", step_us=3100.0, busy_us=2900.0, top_us={"split_kernel": 400.0}),
        )
    )
    for wanted in (
        "NVIDIA H200. Ceilings measured in this run: 4,300 GB/s, 780 TFLOP/s in bf16.",
        "commit unknown commit 0123. torch 2.11.0.",
        "- check: layers: **failed** ValueError: no \\| luck",
        "| attention | ok | 0.0042 |",
        "| sampling | wrong | 7 |",
        "| 1 x 1024 | 12.3 | none |",
        "| 8b decode | 12,346 | True |",
        "| 8b | 3,100 | 2,900 |",
        "| &nbsp; `split_kernel` |  | 400 |",
    ):
        assert wanted in page
    assert "not the figures" not in page
    assert "Not as it should be" not in markdown(results(entry("check", "a")))
    assert "not the figures" in markdown(results(sizes="quick"))
    assert "were not measured" in markdown(results())


def test_busy_time_is_a_union() -> None:
    kernels = [("a", 0.0, 10.0), ("b", 5.0, 12.0), ("a", 20.0, 25.0), ("c", 21.0, 22.0)]
    assert summarize(kernels[::-1], 2) == {
        "kernels": 2.0,
        "busy_us": (12 + 5) / 2,
        "top_us": {"a": 7.5, "b": 3.5, "c": 0.5},
    }
    assert summarize([], 3) == {"kernels": 0.0, "busy_us": 0.0, "top_us": {}}

"""The table: medians of a comparison's JSON, the ratio of Quire to the best rival, and the floors.

    python -m bench.peers.report FILE.json      prints the markdown of a run again

A ratio above 1 means that Quire is better, whichever way the measure goes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISY = 0.10
"""A median of which some sample lost more than this much of a core to others is marked."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One row. floor: what two cores of Zen 4 allow at best, per model (docs/performance.md)."""

    workload: str
    key: str
    title: str
    lower_is_better: bool
    digits: int
    floor: Mapping[str, float]
    target: Mapping[str, float]
    """Ratio to the best rival that the issue asks for."""
    floor_target: Mapping[str, float]
    """Share of the floor that the issue asks for."""


def _row(
    workload: str,
    key: str,
    title: str,
    *,
    lower: bool = False,
    digits: int = 0,
    floor: tuple[float, float] | None = None,
    target: tuple[float, float] | None = None,
    of_floor: Mapping[str, float] | None = None,
) -> Measure:
    """Pairs are (M2, M1)."""

    def both(pair: tuple[float, float] | None) -> dict[str, float]:
        return {} if pair is None else {"M2": pair[0], "M1": pair[1]}

    return Measure(workload, key, title, lower, digits, both(floor), both(target), of_floor or {})


MEASURES: tuple[Measure, ...] = (
    _row("W1", "output_tok_s", "W1 64 mixed requests, output tok/s", floor=(810, 137), target=(1.25, 1.15)),
    _row("W2", "decode_tok_s", "W2 one request, decode tok/s", digits=1, floor=(270, 45),
         target=(1.3, 1.3), of_floor={"M2": 0.8, "M1": 0.8}),
    _row("W2", "ttft_ms", "W2 TTFT ms", lower=True, floor=(51, 264), target=(1.0, 1.0)),
    _row("W3", "seconds", "W3 shared prefix, s", lower=True, digits=2, target=(1.3, 1.3)),
    _row("W4", "prefill_tok_s", "W4 prefill tok/s", floor=(2050, 380), target=(1.0, 1.0)),
    _row("W5", "ttft_p50", "W5 server TTFT p50 ms", lower=True),
    _row("W5", "ttft_p99", "W5 server TTFT p99 ms", lower=True, target=(1.0, 1.0)),
    _row("W5", "tpot_p50", "W5 server TPOT p50 ms", lower=True, digits=1),
    _row("W5", "tpot_p99", "W5 server TPOT p99 ms", lower=True, digits=1),
    _row("W5", "itl_p99", "W5 server ITL p99 ms", lower=True, digits=1, target=(1.0, 1.0)),
    _row("W6", "interactivity", "W6 agents, interactivity tok/s", digits=1, target=(1.3, 1.3)),
    _row("W6", "ttft_p50", "W6 agents TTFT p50 ms", lower=True),
    _row("W6", "ttft_p99", "W6 agents TTFT p99 ms", lower=True),
    _row("W5", "server_first_answer_s", "server: start to first answer, s", lower=True, digits=2),
    _row("engine", "first_answer_s", "in process: start to first answer, s", lower=True, digits=2),
    _row("engine", "load_s", "of that, loading the model, s", lower=True, digits=2),
    _row("engine", "peak_rss_mib", "peak memory, MiB", lower=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine's value of one measure."""

    median: float
    low: float
    high: float
    count: int
    noisy: bool


@dataclass(frozen=True, slots=True)
class Ratio:
    """Quire against the best of the rivals that were measured."""

    measure: Measure
    quire: Cell
    best: str
    best_cell: Cell
    ratio: float


def samples_of(results: Mapping[str, Any], engine: str, workload: str) -> list[dict[str, Any]]:
    """The measured samples (no warm-up): of each repeat's attempts, the one that others disturbed least."""
    chosen: dict[int, dict[str, Any]] = {}
    for sample in results["samples"]:
        if sample["engine"] != engine or sample["workload"] != workload or sample["repeat"] < 0:
            continue
        known = chosen.get(sample["repeat"])
        if known is None or sample["others"] < known["others"]:
            chosen[sample["repeat"]] = sample
    return [chosen[repeat] for repeat in sorted(chosen)]


def cell(results: Mapping[str, Any], engine: str, measure: Measure) -> Cell | None:
    """None where that engine was not measured."""
    if measure.workload == "engine":
        value = results["engines"].get(engine, {}).get(measure.key)
        return None if value is None else Cell(value, value, value, 1, noisy=False)
    samples = samples_of(results, engine, measure.workload)
    if not samples:
        return None
    values = [sample["measures"][measure.key] for sample in samples]
    noisy = any(sample["others"] > NOISY for sample in samples)
    return Cell(statistics.median(values), min(values), max(values), len(values), noisy)


def engines(results: Mapping[str, Any]) -> list[str]:
    """Every engine that has anything to show, Quire first."""
    names = dict.fromkeys([*results["engines"], *(s["engine"] for s in results["samples"])])
    return sorted(names, key=lambda name: not name.startswith("quire"))


def is_rival(name: str) -> bool:
    return not name.startswith("quire")


def compare(results: Mapping[str, Any], measure: Measure) -> Ratio | None:
    """None where Quire or every rival is missing."""
    quire = cell(results, "quire", measure)
    rivals = {
        name: found
        for name in engines(results)
        if is_rival(name) and (found := cell(results, name, measure)) is not None
    }
    if quire is None or not rivals:
        return None
    pick = min if measure.lower_is_better else max
    best = pick(rivals, key=lambda name: rivals[name].median)
    ours, theirs = quire.median, rivals[best].median
    ratio = theirs / ours if measure.lower_is_better else ours / theirs
    return Ratio(measure, quire, best, rivals[best], ratio)


def cache_ratio(results: Mapping[str, Any]) -> float | None:
    """How many times faster W3 is with Quire's prefix cache than without."""
    measure = next(m for m in MEASURES if m.workload == "W3")
    on, off = cell(results, "quire", measure), cell(results, "quire cache-off", measure)
    return None if on is None or off is None else off.median / on.median


def floor_of(measure: Measure, results: Mapping[str, Any]) -> float | None:
    """What the machine of these results allows at best; None where that is not known."""
    is_amd = "AMD" in results["record"]["machine"]["cpu"]
    return measure.floor.get(results["model"]) if is_amd else None


def share_of_floor(measure: Measure, floor: float, value: float) -> float:
    """1 is what the hardware allows at best."""
    return floor / value if measure.lower_is_better else value / floor


def much_slower(samples: Sequence[Mapping[str, Any]], workload: str, factor: float) -> set[str]:
    """Engines whose warm-up was more than `factor` times slower than the best one's, by every measure."""
    warm = {
        s["engine"]: s["measures"] for s in samples if s["workload"] == workload and s["repeat"] < 0
    }
    slow = set(warm)
    for measure in (m for m in MEASURES if m.workload == workload):
        values = {name: found[measure.key] for name, found in warm.items() if measure.key in found}
        if not values:
            continue
        if measure.lower_is_better:
            bound = min(values.values()) * factor
            slow -= {name for name, value in values.items() if value <= bound}
        else:
            bound = max(values.values()) / factor
            slow -= {name for name, value in values.items() if value >= bound}
    return slow


# --- markdown -------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page: ratios, every engine's figures, what was run and how."""
    parts = [_title(results), _ratios(results), _figures(results), _about(results)]
    return "\n".join(parts)


_SMOKE = ("**A smoke run with tiny workloads: the figures mean nothing.**", "")


def _title(results: Mapping[str, Any]) -> str:
    record = results["record"]
    commit = str(record["commit"])[:12] + (" with edits" if record["dirty"] else "")
    machine = record["machine"]
    return "\n".join(
        [
            f"# Quire and its peers on {results['model']} ({results['title']})",
            "",
            f"{record['date']}, commit {commit}, {machine['cpu']}, {machine['cpus_usable']} cores, "
            f"{machine['memory_gib']} GiB. `{record['command']}`",
            "",
            *(_SMOKE if results["smoke"] else ()),
        ]
    )


def _ratios(results: Mapping[str, Any]) -> str:
    model = results["model"]
    lines = [
        "## Quire against the best rival",
        "",
        "A ratio above 1 means that Quire is better. ⚠: something else used the machine.",
        "",
        "| | Quire | best rival | ratio | asked | floor | share of floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for measure in MEASURES:
        found = compare(results, measure)
        if found is None:
            continue
        floor = floor_of(measure, results)
        share = None if floor is None else share_of_floor(measure, floor, found.quire.median)
        lines.append(
            f"| {measure.title} | {_show(found.quire, measure)} "
            f"| {_show(found.best_cell, measure)} {found.best} | **{found.ratio:.2f}** "
            f"| {_asked(found, model, share)} | {'' if floor is None else f'{floor:g}'} "
            f"| {'' if share is None else f'{share:.0%}'} |"
        )
    ratio = cache_ratio(results)
    if ratio is not None:
        lines.append(
            f"| W3, Quire's prefix cache on against off | | | **{ratio:.2f}** "
            f"| 5 {_mark(ratio >= 5)} | | |"
        )
    return "\n".join([*lines, ""])


def _asked(found: Ratio, model: str, share: float | None) -> str:
    asked = []
    target = found.measure.target.get(model)
    if target is not None:
        asked.append(f"{target:g} {_mark(found.ratio >= target)}")
    of_floor = found.measure.floor_target.get(model)
    if of_floor is not None and share is not None:
        asked.append(f"{of_floor:.0%} of floor {_mark(share >= of_floor)}")
    return ", ".join(asked)


def _mark(met: bool) -> str:
    return "met" if met else "**missed**"


def _figures(results: Mapping[str, Any]) -> str:
    names = engines(results)
    lines = [
        "## Every engine",
        "",
        f"Median (least - most) of the repeats; n is given where it is not {results['repeats']}.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for measure in MEASURES:
        cells = [cell(results, name, measure) for name in names]
        if not any(cells):
            continue
        shown = [_range(found, measure, results["repeats"]) for found in cells]
        lines.append(f"| {measure.title} | " + " | ".join(shown) + " |")
    for name, reason in results["skipped"].items():
        lines += ["", f"Skipped: **{name}**, {reason}"]
    return "\n".join([*lines, ""])


def _range(found: Cell | None, measure: Measure, repeats: int) -> str:
    if found is None:
        return "–"
    text = _show(found, measure)
    if found.count > 1:
        text += f" ({found.low:,.{measure.digits}f} - {found.high:,.{measure.digits}f})"
    if measure.workload not in ("engine", "W5", "W6") and found.count != repeats:
        text += f" n={found.count}"
    return text


def _show(found: Cell, measure: Measure) -> str:
    return f"{found.median:,.{measure.digits}f}" + (" ⚠" if found.noisy else "")


def _about(results: Mapping[str, Any]) -> str:
    lines = ["## Versions and settings", ""]
    for name, engine in results["engines"].items():
        settings = json.dumps(engine["settings"], ensure_ascii=False)
        env = " ".join(
            f"{key}={value}" for key, value in engine["env"].items() if key != "PYTHONPATH"
        )
        lines.append(
            f"- **{name}** {engine['version']}: `{settings}`" + (f", `{env}`" if env else "")
        )
        if engine.get("apart"):
            lines.append("  - measured after the others had left: not all fit into memory at once")
        lines += [f"  - failed: {failure}" for failure in engine.get("failures", [])]
    for name in engines(results):
        for workload in ("W5", "W6"):
            for sample in samples_of(results, name, workload)[:1]:
                rate = f" at {sample['rate']:g} requests/s" if sample.get("rate") else ""
                lines.append(f"- **{name}** server, {workload}{rate}: `{sample['command']}`")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")

"""Pictures of simulations as SVG, in the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from quire.plan.figures import e2e, tpot, ttft
from quire.plan.fleet import Run
from quire.plan.replica import Life
from quire.plan.report_lines import TIME_IS, replicas_of

WIDTH, HEIGHT, TOP, BOTTOM, LEFT, PANEL, GAP = 900, 340, 62, 66, 58, 232, 52
MOST_POINTS = 200
STYLE = """
:root { --paper: #ffffff; --text: #1f2328; --faint: #59636e; --grid: #d1d9e0;
  --c0: #2c5bd2; --c1: #b3541e; --c2: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --text: #f0f6fc; --faint: #9198a1; --grid: #3d444d;
  --c0: #8fb0f5; --c1: #f0a36e; --c2: #7fd3a0; } }
text { font: 12px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: var(--text); }
.faint { fill: var(--faint); } .title { font-size: 14px; font-weight: 600; }
.grid { stroke: var(--grid); stroke-width: 0.8; } .line { fill: none; stroke-width: 2; }
"""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x_name: str
    lines: Mapping[str, Points]
    log_x: bool = False
    log_y: bool = False


def draw(content: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Of a sweep, three panels against the rate; of one run, its distributions."""
    about = content["about"]
    panels = sweep_panels(content["points"]) if "points" in content else run_panels(runs)
    gpu = f" on {about['gpu']}" if about["gpu"] else ""
    title = f"{about['model']}{gpu}, {about['trace']}, {replicas_of(about)}"
    source = (
        f"quire simulate, seed {about['seed']}; the time of a step is {TIME_IS[about['step_time']]}"
    )
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
        _text(14, 24, title, "title"),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (PANEL + GAP))
    parts.append(_text(14, HEIGHT - 10, source, "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def sweep_panels(points: Sequence[Mapping[str, Any]]) -> list[Panel]:
    def of(name: str, key: str) -> Points:
        return [(point["rate"], max(point[name][key], 1e-3)) for point in points]

    served = [(point["rate"], point["steady"]["served"]) for point in points]
    x = "requests a second"
    return [
        Panel("TTFT, ms", x, {"p50": of("ttft_ms", "p50"), "p99": of("ttft_ms", "p99")}, log_y=True),
        Panel("ITL, ms", x, {"p50": of("itl_ms", "p50"), "p99": of("itl_ms", "p99")}, log_y=True),
        Panel("requests served a second", x, {"served": served}),
    ]  # fmt: skip


def run_panels(runs: Sequence[Run]) -> list[Panel]:
    lives = [life for run in runs for life in run.lives]
    kinds: dict[str, Callable[[Life], float]] = {"TTFT": ttft, "TPOT": tpot, "end to end": e2e}
    return [
        Panel(name, "ms", {"": _shares([of(life) for life in lives])}, log_x=True)
        for name, of in kinds.items()
    ]


def _shares(seconds: list[float]) -> Points:
    """The share of values, in percent, up to each of some of them."""
    seconds.sort()
    step = max(1, len(seconds) // MOST_POINTS)
    shown = [*range(0, len(seconds), step), len(seconds) - 1] if seconds else []
    return [(max(seconds[i] * 1e3, 1e-3), 100 * (i + 1) / len(seconds)) for i in shown]


@dataclass(frozen=True, slots=True)
class Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], start: float, stop: float, *, log: bool) -> Axis:
        low, high = (min(values), max(values)) if values else (1.0, 1.0)
        if log:
            return cls(low * 0.9, high * 1.1, start, stop, log)
        return cls(0.0, high * 1.05 or 1.0, start, stop, log)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 100 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self.low <= value <= self.high]
        size = 10.0 ** math.floor(math.log10(self.high))
        step = size if self.high / size >= 4 else size / 2 if self.high / size >= 2 else size / 5
        return [step * index for index in range(int(self.high / step) + 1)]


def _panel(panel: Panel, left: float) -> Iterator[str]:
    points = [point for line in panel.lines.values() for point in line]
    x = Axis.of([p[0] for p in points], left, left + PANEL, log=panel.log_x)
    y = Axis.of([p[1] for p in points], HEIGHT - BOTTOM, TOP, log=panel.log_y)
    yield _text(left, TOP - 14, panel.title)
    yield _text(left + PANEL, HEIGHT - BOTTOM + 34, panel.x_name, "faint", "end")
    for tick in y.ticks():
        yield _rule(left, y(tick), left + PANEL, y(tick))
        yield _text(left - 6, y(tick) + 4, f"{tick:g}", "faint", "end")
    for tick in x.ticks():
        yield _rule(x(tick), TOP, x(tick), HEIGHT - BOTTOM)
        yield _text(x(tick), HEIGHT - BOTTOM + 17, f"{tick:g}", "faint", "middle")
    for index, (name, line) in enumerate(panel.lines.items()):
        at = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        yield f'<polyline class="line" stroke="var(--c{index})" points="{at}"/>'
        if name:
            color = f'style="fill: var(--c{index})"'
            place = left + PANEL - 64 + 34 * index
            yield f'<text x="{place}" y="{TOP - 14}" {color}>{escape(name)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )

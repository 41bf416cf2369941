"""The picture of a plan as SVG: cost and ITL of one replica of each layout, against the rate of requests.

Its colours follow the reader's light or dark theme. It has a background of its own, so that it can be read
on any page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from quire.plan.load import Lengths, Replica
from quire.plan.model import Sized, place
from quire.plan.report import Report
from quire.plan.search import HIGHEST_LOAD, Candidate, replica_of

WIDTH, HEIGHT, TOP, BOTTOM = 900, 430, 62, 92
LEFT, GAP, PANEL = 58, 74, 370
POINTS, MOST_CURVES = 48, 5
STYLE = """
:root { --paper: #ffffff; --text: #1f2328; --faint: #59636e; --grid: #d1d9e0;
  --c0: #2c5bd2; --c1: #b3541e; --c2: #2f7d4f; --c3: #8a3ea8; --c4: #a3214f; --c5: #59636e; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --text: #f0f6fc; --faint: #9198a1; --grid: #3d444d;
  --c0: #8fb0f5; --c1: #f0a36e; --c2: #7fd3a0; --c3: #d79af0; --c4: #f58fb0; --c5: #9198a1; } }
text { font: 12px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: var(--text); }
.faint { fill: var(--faint); } .title { font-size: 14px; font-weight: 600; }
.grid { stroke: var(--grid); stroke-width: 0.8; } .mark { stroke: var(--faint); stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 2; }
"""


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    replica: Replica
    dollars: float
    """An hour, of one replica."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1, 2, 5) if self.high / self.low < 2000 else (1,)
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def draw_plan(report: Report, found: Sequence[Candidate], options: Mapping[str, object]) -> str:
    """The report's layout, and of other GPUs and formats the cheapest layouts that meet the SLO."""
    sized, wish = report.sized, report.wish
    chosen: list[Sized] = []
    kinds = {(sized.layout.gpu.name, sized.layout.quantization)}
    for each in found:
        kind = (each.layout.gpu.name, each.layout.quantization)
        if each.refused is None and kind not in kinds and len(chosen) < MOST_CURVES - 1:
            kinds.add(kind)
            budget = {"max_num_batched_tokens": each.budget}
            chosen.append(place(sized.model, each.layout, {**options, **budget}))
    curves = [
        Curve(
            each.layout.label,
            replica_of(each, wish.lengths),
            each.layout.tensor_parallel * each.layout.gpu.price,
        )
        for each in (sized, *chosen)
    ]
    lengths, date = wish.lengths, sized.layout.gpu.date
    return draw(
        curves,
        lengths,
        title=f"{sized.model.name}, {lengths.prompt:,} tokens in, {lengths.output:,} out: an estimate",
        source=f"quire plan: roofline at published efficiencies; prices on demand, {date}",
        rate=wish.rate,
        slo=wish.slo,
    )


def draw(
    curves: Sequence[Curve],
    lengths: Lengths,
    *,
    title: str,
    source: str,
    rate: float | None = None,
    slo: Mapping[str, float],
) -> str:
    """rate: what is asked of all replicas together. It and the SLO of ITL are dashed lines. The ITL is the
    p99 if the SLO has one, else the mean."""
    tail = "itl" in slo
    itl = slo.get("itl", slo.get("tpot"))
    lines = [_points(curve, lengths, tail=tail) for curve in curves]
    rates = [point[0] for line in lines for point in line]
    panels: list[tuple[str, Callable[[tuple[float, float, float]], float], float | None]] = [
        ("$ per million tokens, one replica", lambda point: point[1], None),
        (f"{'p99' if tail else 'mean'} of ITL, ms", lambda point: point[2], itl and itl * 1e3),
    ]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
        _text(14, 24, title, "title"),
    ]
    for number, (name, value, limit) in enumerate(panels):
        left = LEFT + number * (PANEL + GAP)
        values = [value(point) for line in lines for point in line]
        values += [] if limit is None else [limit]
        x = Scale(min(rates) * 0.95, max(rates) * 1.05, left, left + PANEL)
        y = Scale(min(values) * 0.9, max(values) * 1.1, HEIGHT - BOTTOM, TOP)
        parts += _axes(x, y, name)
        if limit is not None:
            parts.append(_rule(x.start, y(limit), x.stop, y(limit)))
            parts.append(_text(x.start + 6, y(limit) - 5, "SLO", "faint"))
        if rate is not None and x.low < rate < x.high:
            parts.append(_rule(x(rate), y.start, x(rate), y.stop))
            height = y.start - 8 if number else y.stop + 12
            parts.append(_text(x(rate) - 5, height, f"{rate:g}/s asked", "faint", "end"))
        for index, line in enumerate(lines):
            at = " ".join(f"{x(point[0]):.1f},{y(value(point)):.1f}" for point in line)
            parts.append(
                f'<polyline class="line" stroke="var(--c{index % 6})" points="{at}"/>'
                f'<circle cx="{x(line[-1][0]):.1f}" cy="{y(value(line[-1])):.1f}" r="3.5" '
                f'fill="var(--c{index % 6})"/>'
            )
    parts += _legend(curves)
    parts.append(_text(14, HEIGHT - 10, source, "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _points(curve: Curve, lengths: Lengths, *, tail: bool) -> list[tuple[float, float, float]]:
    """Rate, dollars for a million tokens, milliseconds of ITL; up to nearly the saturation rate."""
    most = curve.replica.most_rows * HIGHEST_LOAD
    low = most / 400
    rows = [low * (most / low) ** (step / (POINTS - 1)) for step in range(POINTS)]
    points = [curve.replica.with_rows(each) for each in rows]
    return [
        (
            each.rate,
            curve.dollars / 3600 / each.rate / lengths.total * 1e6,
            1e3 * (each.itl_p99 if tail else each.itl),
        )
        for each in points
    ]


def _axes(x: Scale, y: Scale, name: str) -> Iterator[str]:
    yield _text(x.start, TOP - 12, name)
    for tick in x.ticks():
        yield f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.start}" y2="{y.stop}"/>'
        yield _text(x(tick), y.start + 16, f"{tick:g}", "faint", "middle")
    for tick in y.ticks():
        yield f'<line class="grid" x1="{x.start}" x2="{x.stop}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        yield _text(x.start - 6, y(tick) + 4, f"{tick:g}", "faint", "end")
    yield _text((x.start + x.stop) / 2, y.start + 32, "requests per second", "faint", "middle")


def _legend(curves: Sequence[Curve]) -> Iterator[str]:
    width = (WIDTH - 28) / max(1, len(curves))
    for index, curve in enumerate(curves):
        left = 14 + index * width
        yield (
            f'<line class="line" stroke="var(--c{index % 6})" x1="{left:.0f}" x2="{left + 18:.0f}" '
            f'y1="{HEIGHT - 36}" y2="{HEIGHT - 36}"/>'
        )
        yield _text(left + 24, HEIGHT - 32, curve.label)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="mark" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )

"""The tables and the picture of SERVING.md, from the results of `bench.levers`.

    python -m bench.levers_plot [FILE]     writes SERVING.md's tables, docs/images/levers-light.svg, -dark.svg

A dot is a setting's ratio to its lever's first setting, the default. Right of the line is better: of times,
the ratio of the default to it is drawn.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench.levers import RESULT, ROOT

PAGE = ROOT / "SERVING.md"
IMAGES = ROOT / "docs" / "images"


class Measure(NamedTuple):
    key: str
    title: str
    less_is_better: bool = True


TABLE = (
    Measure("ttft_ms", "TTFT, ms"),
    Measure("tpot_ms", "TPOT, ms"),
    Measure("itl_p99_ms", "ITL p99, ms"),
    Measure("itl_max_ms", "longest"),
    Measure("burst_ttft_ms", "TTFT at once, ms"),
    Measure("burst_itl_p99_ms", "ITL p99 at once, ms"),
    Measure("output_tok_s", "tokens/s at once", less_is_better=False),
    Measure("memory_mib", "memory, MiB"),
)
RARE = (Measure("cached", "cached"), Measure("preemptions", "preemptions"))
"""Columns where a setting has any."""
DRAWN = (
    Measure("ttft_ms", "time to first token"),
    Measure("itl_max_ms", "longest between tokens (ITL)"),
    Measure("output_tok_s", "throughput", less_is_better=False),
)
COLORS = {
    "light": {
        "text": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "better": "#2c5bd2", "worse": "#c4570e",
    },
    "dark": {
        "text": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "better": "#8fb0f5", "worse": "#f0a35e",
    },
}  # fmt: skip
LEFT, PANEL, GAP, TOP, ROW, HEAD = 196, 204, 16, 62, 20, 27
WIDTH = LEFT + 3 * (PANEL + GAP)
LEAST, MOST = 1 / 8, 8
TICKS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
SAME = 0.1
"""Ratios this near to 1 are grey: they are within the spread of the runs."""
Results = Mapping[str, Mapping[str, Any]]


# --- tables ----------------------------------------------------------------------------------------


def table(lever: Mapping[str, Any]) -> str:
    """Medians, and in brackets the ratio to the first row."""
    settings = lever["settings"]
    columns = [m for m in TABLE if m.key in settings[0]["medians"]]
    columns += [m for m in RARE if any(each["medians"][m.key] for each in settings)]
    rows = [["", *(m.title for m in columns)], ["---"] * (len(columns) + 1)]
    for number, setting in enumerate(settings):
        cells = [_cell(setting, m, is_default=number == 0) for m in columns]
        rows.append([setting["name"], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(setting: Mapping[str, Any], measure: Measure, *, is_default: bool) -> str:
    value, ratio = setting["medians"][measure.key], setting["ratios"].get(measure.key)
    if measure.key == "cached":
        return f"{value:.0%}".replace("%", " %")
    text = f"{value:,.0f}" if value >= 20 or value == int(value) else f"{value:.2g}"
    return text if is_default or ratio is None or measure in RARE else f"{text} ({ratio:.2f})"


def with_tables(page: str, results: Results) -> str:
    """The page, with the table of each lever between its marks."""
    for name, lever in results.items():
        mark = f"<!-- levers: {name} -->"
        pattern = re.compile(re.escape(mark) + r"\n.*?<!-- end -->", re.S)
        if not pattern.search(page):
            raise ValueError(f"{PAGE.name} has no place for {name!r}: {mark} ... <!-- end -->.")
        count = len(lever["settings"][0]["rounds"])
        rounds = lever.get("note") or f"{count} rounds"
        caption = f"Load: {lever['load']}; {rounds}."
        made = f"{mark}\n{caption}\n\n{table(lever)}\n<!-- end -->"
        page = pattern.sub(lambda _, made=made: made, page)  # type: ignore[misc]
    return page


# --- picture ---------------------------------------------------------------------------------------


def picture(results: Results, colors: Mapping[str, str]) -> str:
    """An SVG with a transparent background."""
    rows: list[str] = []
    y = float(TOP)
    for name, lever in results.items():
        rows.append(_text(8, y + 15, name, colors["text"], weight=600))
        y += HEAD - 4
        for setting in lever["settings"][1:]:
            y += ROW
            rows += _row(y - ROW / 2, setting, colors)
    height = y + 44
    body = "\n".join([*_frame(y + 8, height, results, colors), *rows])
    style = "font-family: -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" style="{style}" '
        f'role="img" aria-label="What each setting changes, as ratios to the default">\n{body}\n</svg>\n'
    )


def better(setting: Mapping[str, Any], measure: Measure) -> float | None:
    """How many times as good as the default."""
    ratio: float | None = setting["ratios"].get(measure.key)
    return 1 / ratio if ratio and measure.less_is_better else ratio


def _row(y: float, setting: Mapping[str, Any], colors: Mapping[str, str]) -> Iterator[str]:
    yield _text(18, y + 4, setting["name"], colors["faint"], size=12)
    for panel, measure in enumerate(DRAWN):
        ratio = better(setting, measure)
        if ratio is None:
            continue
        x, one = _x(panel, ratio), _x(panel, 1)
        same = abs(math.log(ratio)) < SAME
        color = colors["faint" if same else "better" if ratio > 1 else "worse"]
        yield (
            f'<line x1="{one:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" '
            'stroke-width="2.5"/>'
        )
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        left = ratio < 1
        if not _x(panel, LEAST) + 30 < x < _x(panel, MOST) - 30:  # no room beyond the dot
            x, left = one, not left
        label = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
        at, anchor = (x - 8, "end") if left else (x + 8, "start")
        yield _text(at, y + 4, label, colors["text"], size=11, anchor=anchor)


def _x(panel: int, ratio: float) -> float:
    place = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + panel * (PANEL + GAP) + 8 + place * (PANEL - 16)


def _frame(
    bottom: float, height: float, results: Results, colors: Mapping[str, str]
) -> Iterator[str]:
    for panel, measure in enumerate(DRAWN):
        middle = _x(panel, 1)
        yield _text(middle, 16, measure.title, colors["text"], anchor="middle", weight=600)
        yield _text(middle, 33, "← worse   |   better →", colors["faint"], size=11, anchor="middle")
        for tick in TICKS:
            x = _x(panel, tick)
            color, width = (colors["text"], 1.2) if tick == 1 else (colors["grid"], 0.8)
            yield (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom:.1f}" stroke="{color}" '
                f'stroke-width="{width}"/>'
            )
            label = f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}"
            yield _text(x, TOP - 13, label, colors["faint"], size=10.5, anchor="middle")
    yield _text(8, height - 10, source(results), colors["faint"], size=11)


def source(results: Results) -> str:
    """Date, machine and rounds, from the records of the runs."""
    first = next(iter(results.values()))
    record = first["record"]
    machine = record["machine"]
    counts = sorted({len(lever["settings"][0]["rounds"]) for lever in results.values()})
    rounds = f"{counts[0]} to {counts[-1]}" if counts[1:] else str(counts[0])
    return (
        f"Ratios to the default, medians of {rounds} interleaved rounds; {record['date'][:10]}, "
        f"{machine['cpu']}, {machine['cpus']} cores, shared; commit {record['commit'][:7]}"
    )


def _text(
    x: float, y: float, text: str, color: str, *, size: float = 13, anchor: str = "start",
    weight: int = 400,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def main(words: Sequence[str]) -> None:
    path = Path(words[0]) if words else RESULT
    results = json.loads(path.read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for scheme, colors in COLORS.items():
        (IMAGES / f"levers-{scheme}.svg").write_text(picture(results, colors), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

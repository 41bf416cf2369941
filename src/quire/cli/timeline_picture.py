"""A timeline as an SVG: a bar for each request, with its phases, and one request in focus."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from quire.errors import ConfigError

COLOURS = {
    "queued": "#b8b8b8", "prefill": "#e3a857", "decode": "#4878a8", "preempted": "#c0392b",
    "recompute": "#f0cf9c", "running": "#4878a8",
}  # fmt: skip
WIDTH, LEFT, RIGHT, ROW, TOP = 920, 64, 16, 15, 46
MOST_ROWS = 28
STEPS = 26

Span = tuple[float, float, str]


def picture(trace: dict[str, Any], request: str | None = None) -> str:
    """trace: of `timeline`. request: `r17`; then only those that overlap it are drawn, over its time, and a
    light band shows when it was queued."""
    bars = _bars(trace["traceEvents"])
    if request is not None:
        request = f"r{request.removeprefix('r')}"
        if request not in bars:
            raise ConfigError(f"the timeline has no request {request}.")
    if not bars:
        raise ConfigError("the timeline has no requests.")
    start, end = _window(bars, request)
    chosen = [name for name, spans in bars.items() if spans[0][0] < end and spans[-1][1] > start]
    chosen.sort(key=lambda name: bars[name][0][0])
    if len(chosen) > MOST_ROWS:
        chosen = _nearest(chosen, request)
    height = TOP + STEPS + ROW * len(chosen) + 34
    scale = (WIDTH - LEFT - RIGHT) / (end - start)

    def x(time: float) -> float:
        return LEFT + (min(max(time, start), end) - start) * scale

    parts = _legend({phase for name in chosen for _, _, phase in bars[name]})
    focus = bars[request][0] if request is not None else None
    if focus is not None and focus[2] == "queued":
        left, width = x(focus[0]), x(focus[1]) - x(focus[0])
        parts.append(_box(left, TOP, width, height - TOP - 30, "#fdf1dc"))
    parts += _steps(trace["traceEvents"], start, end, x)
    for number, name in enumerate(chosen):
        y = TOP + STEPS + ROW * number
        weight = ' font-weight="bold"' if name == request else ""
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 10}" text-anchor="end"{weight}>{escape(name)}</text>'
        )
        for begin, until, phase in bars[name]:
            if until > start and begin < end:
                width = max(0.6, x(until) - x(begin))
                title = f"{name}: {phase} {(until - begin) / 1e3:.1f} ms"
                thick = 2 if phase in ("queued", "preempted") and name != request else 0
                parts.append(
                    _box(x(begin), y + thick, width, ROW - 4 - 2 * thick, COLOURS[phase], title)
                )
    parts += _axis(start, end, height, x)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="11" fill="#222">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _bars(events: Iterable[dict[str, Any]]) -> dict[str, list[Span]]:
    """The phases of each request, in order."""
    found: dict[str, list[Span]] = {}
    begun: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "request" and event["name"] in COLOURS:
            if event["ph"] == "b":
                begun[event["id"], event["name"]] = event["ts"]
            else:
                start = begun.pop((event["id"], event["name"]))
                found.setdefault(event["id"], []).append((start, event["ts"], event["name"]))
    return found


def _window(bars: dict[str, list[Span]], request: str | None) -> tuple[float, float]:
    if request is None:
        return min(b[0][0] for b in bars.values()), max(b[-1][1] for b in bars.values())
    start, end = bars[request][0][0], bars[request][-1][1]
    margin = 0.06 * (end - start)
    return start - margin, end + margin


def _nearest(names: list[str], request: str | None) -> list[str]:
    middle = names.index(request) if request is not None else 0
    first = max(0, min(middle - MOST_ROWS // 2, len(names) - MOST_ROWS))
    return names[first : first + MOST_ROWS]


def _legend(shown: set[str]) -> list[str]:
    parts, at = [], float(LEFT)
    for phase in (phase for phase in COLOURS if phase in shown):
        parts.append(_box(at, 10, 11, 11, COLOURS[phase]))
        parts.append(f'<text x="{at + 16}" y="20">{phase}</text>')
        at += 32 + 7 * len(phase)
    text = "steps: the darker, the more tokens of prompts"
    parts.append(f'<text x="{WIDTH - RIGHT}" y="20" text-anchor="end">{text}</text>')
    return parts


def _steps(events: Iterable[dict[str, Any]], start: float, end: float, x: Any) -> list[str]:
    steps = [e for e in events if e["ph"] == "X" and e["ts"] < end and e["ts"] + e["dur"] > start]
    most = max((_prompt_tokens(step) for step in steps), default=0) or 1
    parts = [f'<text x="{LEFT - 8}" y="{TOP + 13}" text-anchor="end">steps</text>']
    for step in steps:
        left, right = x(step["ts"]), x(step["ts"] + step["dur"])
        shade = 225 - int(150 * _prompt_tokens(step) / most)
        colour = f"#{shade:02x}{shade:02x}{shade:02x}"
        parts.append(_box(left, TOP, max(0.4, right - left - 0.3), 18, colour, step["name"]))
    return parts


def _prompt_tokens(step: dict[str, Any]) -> int:
    return int(step["args"]["tokens"]) - int(step["args"]["rows"])


def _axis(start: float, end: float, height: float, x: Any) -> list[str]:
    length = end - start
    tick = next(t for t in _ticks() if length / t <= 10)
    y, parts = height - 22, []
    at = 0.0
    while at <= length:
        place = x(start + at)
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{y}" y2="{y + 4}" stroke="#888"/>'
        )
        label = f"{at / 1e6:g} s" if tick >= 1e6 else f"{at / 1e3:g} ms"
        parts.append(f'<text x="{place:.1f}" y="{y + 16}" text-anchor="middle">{label}</text>')
        at += tick
    return parts


def _ticks() -> Iterable[float]:
    size = 1.0
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10


def _box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    shape = f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"

"""The chart in the README: Quire against the best other engine, from the committed results.

    python -m bench.ratio_chart        writes docs/images/ratios-light.svg and ratios-dark.svg

A bar is the ratio of Quire to the best other engine. Above 1 Quire is better, whichever way the measure
goes. Every number is computed from the JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from bench.peers.report import MEASURES, compare

ROOT = Path(__file__).parents[1]
RESULTS = ("2026-11-21-79aa02a-M2.json", "2026-11-21-79aa02a-M1.json")
"""In bench/results/cpu, in the order of the bars in a row."""
ROWS = {
    ("W1", "output_tok_s"): "64 requests at once: tokens/s",
    ("W2", "decode_tok_s"): "one request: tokens/s",
    ("W2", "ttft_ms"): "one request: time to first token",
    ("W3", "seconds"): "32 requests, shared prefix: time",
    ("W4", "prefill_tok_s"): "a prompt of 2,048 tokens: tokens/s",
    ("W5", "ttft_p99"): "server under load: p99 first token",
    ("W5", "itl_p99"): "server under load: p99 next token",
    ("engine", "first_answer_s"): "in process: start to first answer",
}
NAMES = {"vllm": "vLLM", "openvino": "OpenVINO", "transformers": "transformers"}
COLORS = {
    "light": {
        "text": "#1f2328",
        "faint": "#59636e",
        "grid": "#d1d9e0",
        "bars": ("#2c5bd2", "#8fb0f5"),
    },
    "dark": {
        "text": "#f0f6fc",
        "faint": "#9198a1",
        "grid": "#3d444d",
        "bars": ("#8fb0f5", "#4d74c9"),
    },
}
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 256, 24, 58, 44, 14
MOST = 2.0


def chart(results: list[Mapping[str, Any]], colors: Mapping[str, Any]) -> str:
    """An SVG with a transparent background. results: of each model, as `bench.peers.compare` writes them."""
    height = TOP + ROW * len(ROWS) + 46
    parts = [*_legend(results, colors), *_grid(height, colors)]
    for row, ((workload, key), label) in enumerate(ROWS.items()):
        y = TOP + ROW * row + ROW / 2
        parts.append(_text(LEFT - 12, y + 4.5, label, colors["text"], anchor="end"))
        measure = next(m for m in MEASURES if (m.workload, m.key) == (workload, key))
        for index, result in enumerate(results):
            found = compare(result, measure)
            if found is not None:
                top = y - BAR - 1 + index * (BAR + 2)
                parts += _bar(top, found.ratio, NAMES.get(found.best, found.best), index, colors)
    parts += _baseline(height, colors)
    parts.append(_text(12, height - 8, _source(results), colors["faint"], size=11.5))
    body = "\n".join(parts)
    style = "font-family: -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" style="{style}" '
        f'role="img" aria-label="Ratios of Quire to the best other engine">\n{body}\n</svg>\n'
    )


def _x(ratio: float) -> float:
    return LEFT + ratio / MOST * (WIDTH - LEFT - RIGHT)


def _grid(height: float, colors: Mapping[str, Any]) -> Iterator[str]:
    for ratio in (0, 0.5, 1.0, 1.5, 2.0):
        yield _line(_x(ratio), height - 46, colors["grid"], 0.8)
        yield _text(
            _x(ratio), height - 30, f"{ratio:g}", colors["faint"], size=11.5, anchor="middle"
        )


def _baseline(height: float, colors: Mapping[str, Any]) -> Iterator[str]:
    x = _x(1.0)
    yield _line(x, height - 46, colors["text"], 1.4)
    yield _text(
        x, TOP - 12, "1 = the best other engine", colors["text"], size=11.5, anchor="middle"
    )
    yield _text(x + 86, TOP - 12, "Quire is better \u2192", colors["faint"], size=11.5)


def _line(x: float, bottom: float, color: str, width: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}" '
        f'stroke="{color}" stroke-width="{width}"/>'
    )


def _legend(results: list[Mapping[str, Any]], colors: Mapping[str, Any]) -> Iterator[str]:
    x = 12.0
    for result, color in zip(results, colors["bars"], strict=True):
        yield f'<rect x="{x}" y="13" width="12" height="12" rx="2" fill="{color}"/>'
        yield _text(x + 18, 23.5, result["title"], colors["text"])
        x += 130


def _bar(
    y: float, ratio: float, rival: str, index: int, colors: Mapping[str, Any]
) -> Iterator[str]:
    yield (
        f'<rect x="{LEFT}" y="{y:.1f}" width="{_x(ratio) - LEFT:.1f}" height="{BAR}" '
        f'fill="{colors["bars"][index]}"/>'
    )
    label = f"{ratio:.2f} \u00d7 {rival}"
    at = _x(ratio) + 7
    if at < _x(1.0) < at + 6.5 * len(label):  # it would lie across the line
        at = _x(1.0) + 7
    yield _text(at, y + 11, label, colors["text"], size=11.5)


def _text(
    x: float, y: float, text: str, color: str, *, size: float = 13, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _source(results: list[Mapping[str, Any]]) -> str:
    """Date, machine and versions, from the records of the runs."""
    record = results[0]["record"]
    machine, versions = record["machine"], results[0]["engines"]
    others = ", ".join(
        f"{NAMES.get(name, name)} {versions[name]['version'].split('-')[0]}"
        for name in ("vllm", "openvino", "llama.cpp", "transformers")
        if versions[name]["version"][0].isdigit()
    )
    return (
        f"{record['date'][:10]}, {machine['cpu']}, {machine['cpus']} cores, bfloat16, commit "
        f"{record['commit'][:7]}; against {others}, llama.cpp"
    )


def main() -> None:
    folder = ROOT / "bench" / "results" / "cpu"
    results = [json.loads((folder / name).read_text(encoding="utf-8")) for name in RESULTS]
    for scheme, colors in COLORS.items():
        path = ROOT / "docs" / "images" / f"ratios-{scheme}.svg"
        path.write_text(chart(results, colors), encoding="utf-8")


if __name__ == "__main__":
    main()

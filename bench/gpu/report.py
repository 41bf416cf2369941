"""The markdown of a run's JSON: what was asked for and what was measured.

PYTHONPATH=src python -m bench.gpu.report DIR/gpu.json      prints it again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of issue 4's table. path: part, case, keys of its values. asked: reached from there on."""

    title: str
    path: tuple[str, ...]
    asked: float
    lower: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.asked if self.lower else value >= self.asked


FA3_TFLOPS = 590.0
"""The middle of what is published of FlashAttention-3 at D = 128; it is rarely installed to be measured."""

_8B = "llama-8b"
FIGURES: tuple[Figure, ...] = (
    Figure("8B, one request: of the roofline", ("engine", f"{_8B} decode 1 x 1024", "share"), 0.85),
    Figure("0.6B, one request: tok/s", ("engine", "qwen-0.6b decode 1 x 1024", "tok_s"), 1200),
    Figure("8B, 64 requests: of the roofline", ("engine", f"{_8B} decode 64 x 1024", "share"), 0.8),
    Figure("8B, 256 requests: of the roofline", ("engine", f"{_8B} decode 256 x 1024", "share"), 0.8),
    Figure("8B, prompt of 1k: of the roofline", ("engine", f"{_8B} prefill 1024", "share"), 0.75),
    Figure("8B, prompt of 8k: of the roofline", ("engine", f"{_8B} prefill 8192", "share"), 0.75),
    Figure("decode attention, 64 x 8k: of the copy's bandwidth",
           ("kernels", f"{_8B} decode attention", "64 x 8192", "share"), 0.85),
    Figure("prefill attention, 8k: TFLOP/s, for 0.75 of FA3's",
           ("kernels", f"{_8B} prefill attention", "8192", "tflop_s"), 0.75 * FA3_TFLOPS),
    Figure("8B, 64 requests: host gap, share of a step",
           ("profile", f"{_8B} 64 requests, graphs", "gap_share"), 0.03, lower=True),
    Figure("8B, 256 x 1024/1024: of the roofline", ("engine", f"{_8B} 256 x 1024/1024", "share"), 0.75),
)  # fmt: skip


def value_of(results: Results, path: Sequence[str]) -> float | None:
    """None where the run does not have it."""
    part, case, *keys = path
    for entry in results["entries"]:
        if (entry["part"], entry["name"]) == (part, case):
            found: Any = entry["values"]
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            return found if isinstance(found, (int, float)) else None
    return None


def markdown(results: Results) -> str:
    entries = results["entries"]
    parts = [_title(results), _figures(results)]
    failed = [entry for entry in entries if entry["status"] != "ok"]
    if failed:
        parts.append("## Not as it should be\n\n" + "\n".join(map(_failure, failed)))
    checks = [entry for entry in entries if entry["part"] == "check"]
    if checks:
        rows = {
            entry["name"]: {"": entry["status"], "worst error": _worst(entry)} for entry in checks
        }
        parts.append("## Checks\n\n" + table(rows))
    for part in ("first-hour", "kernels", "engine", "profile"):
        flat: dict[str, Mapping[str, Any]] = {}
        for entry in entries:
            values = entry["values"]
            if entry["part"] != part or not values:
                continue
            if all(isinstance(value, dict) for value in values.values()):
                parts.append(f"## {entry['name']}\n\n" + table(values))
            else:
                flat[entry["name"]] = {k: v for k, v in values.items() if not isinstance(v, dict)}
                for name, value in values.get("top_us", {}).items():
                    flat[f"&nbsp; `{name}`"] = {"busy_us": value}
        if flat:
            parts.append(f"## {part}\n\n" + table(flat))
    return "\n\n".join(parts) + "\n"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One column for each key that any row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(shown(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _title(results: Results) -> str:
    record = results["record"]
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    machine = {
        entry["name"]: entry["values"] for entry in results["entries"] if entry["part"] == "machine"
    }
    ceilings, facts = machine.get("ceilings", {}), machine.get("facts", {})
    lines = [
        "# Quire on a GPU",
        f"{record['date']}, commit {record['commit'] or 'unknown'} {results.get('note', '')}. {versions}. "
        f"`{record['command']}`",
        f"{facts.get('device', 'unknown device')}. Ceilings measured in this run: "
        f"{shown(ceilings.get('bytes_per_s', 0) / 1e9)} GB/s, "
        f"{shown(ceilings.get('flops_per_s', 0) / 1e12)} TFLOP/s in bf16."
        if ceilings
        else "The ceilings were not measured: shares are of 4,300 GB/s and 790 TFLOP/s.",
    ]
    if results["sizes"] != "full":
        lines.append(f"**Sizes: {results['sizes']}**: not the figures that are asked for.")
    return "\n\n".join(lines)


def _figures(results: Results) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for figure in FIGURES:
        value = value_of(results, figure.path)
        verdict = "not measured" if value is None else "yes" if figure.reached(value) else "no"
        sign = "at most" if figure.lower else "at least"
        rows[figure.title] = {
            "asked": f"{sign} {shown(figure.asked)}",
            "measured": value,
            "reached": verdict,
        }
    return "## Figures to reach\n\n" + table(rows)


def _failure(entry: Mapping[str, Any]) -> str:
    last = (entry["error"] or "").strip().splitlines()[-1:]
    why = last or [json.dumps(entry["values"])[:600] if entry["status"] == "wrong" else ""]
    remedy = f" *{entry['remedy']}*" if entry.get("remedy") else ""
    return f"- {entry['part']}: {entry['name']}: **{entry['status']}** {shown(why[0])}{remedy}"


def _worst(entry: Mapping[str, Any]) -> float | None:
    errors: Iterable[float] = entry["values"].get("error", {}).values()
    return max(errors, default=None)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))

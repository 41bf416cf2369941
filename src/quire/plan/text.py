"""A plan as text, and as JSON."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence

from quire.plan.devices import sources
from quire.plan.load import Point
from quire.plan.report import Figure, Report
from quire.plan.search import Candidate, Wish

SHOWN = 5
"""Layouts that meet the SLO, and that do not, unless all are asked for."""


def plan_text(
    report: Report, found: Sequence[Candidate], *, formulas: bool, all_layouts: bool
) -> Iterator[str]:
    yield from _head(report)
    if report.misfit is not None:
        yield from ("", *_layouts(found, report.wish, all_layouts))
        return
    lengths, replica = report.wish.lengths, report.replica
    yield from ("", "Memory of each GPU", *_figures(report.memory(), formulas))
    yield from ("", f"Tokens a second of one replica, at {lengths.context:,.0f} tokens of context")
    yield from _table(
        [
            {
                "rows": f"{row.rows:,}",
                "bound": f"{row.bound_tokens_per_s:,.0f}",
                report.kind: f"{row.likely_tokens_per_s:,.0f}",
                "ITL, bound": _ms(row.bound_itl_s),
                f"{report.kind} ": _ms(row.likely_itl_s),
                "bound by": row.limit,
            }
            for row in report.batches()
        ]
    )
    if formulas:
        yield from (f"  {row.rows}: {row.formula}" for row in report.batches())
    yield from ("", f"Prompts of {lengths.prompt:,}, answers of {lengths.output:,}")
    yield from _figures(report.speed(), formulas)
    yield from ("", f"{report.kind.capitalize()} at rates, of all replicas")
    yield from _table([_point(point, report) for point in report.points()])
    asked = replica.at(report.rate)
    total = report.rate * report.replicas
    if asked is None:
        yield f"{total:,.2f} requests/s are more than it can serve."
    else:
        yield from ("", f"Cost at {total:,.2f} requests/s, ${report.gpu.price:g} a GPU and hour")
        yield from _figures(report.cost(asked), formulas)
    yield from _layouts(found, report.wish, all_layouts)


def _head(report: Report) -> Iterator[str]:
    sized, gpu = report.sized, report.gpu
    layout, resolved, model = sized.layout, sized.prepared.resolved, sized.model
    price = f"${gpu.price:g} an hour"
    if gpu.prices[0] <= gpu.price <= gpu.prices[1]:
        price += f" (${gpu.prices[0]:g} to {gpu.prices[1]:g}, {gpu.date})"
    experts = ""
    if model.experts.total > 1:
        experts = f", {model.experts.chosen} of {model.experts.total} experts a token"
    yield (
        f"{model.name}: {resolved.spec.num_layers} layers, {resolved.spec.num_parameters():,} parameters"
        f"{experts}; weights {layout.quantization or resolved.dtype}, KV {resolved.kv_cache_dtype}"
    )
    yield (
        f"{report.replicas} x {layout.tensor_parallel} x {gpu.title}; {gpu.bandwidth / 1e12:g} TB/s, "
        f"{gpu.bf16 / 1e12:g} TFLOP/s in bf16, {price}"
    )
    if report.cost_model is not None:
        about, error = report.cost_model.about, report.cost_model.errors.get("all")
        held_out = "" if error is None else f"; mean error of steps not fitted {error:.1%}"
        yield f"predicted by what was measured of {about.get('model', 'a model')}{held_out}"
    if experts:
        yield "Quire does not serve mixtures of experts yet: this is a plan only."
    elif report.misfit is None:
        yield f"check: quire serve --dry-run {shlex.join(sized.dry_run)}"


def _point(point: Point, report: Report) -> dict[str, str]:
    cost = report.cost(point)[0].value
    is_asked = report.wish.rate is not None and math.isclose(point.rate, report.rate, rel_tol=1e-3)
    return {
        "requests/s": f"{'asked: ' if is_asked else ''}{point.rate * report.replicas:,.2f}",
        "load": f"{point.utilization:.0%}",
        "running": f"{point.rows * report.replicas:,.1f}",
        "ITL": _ms(point.itl),
        "p99": _ms(point.itl_p99),
        "TTFT": _ms(point.ttft),
        "p99 ": _ms(point.ttft_p99),
        "$/M tokens": f"{cost:,.3f}",
    }


def _layouts(found: Sequence[Candidate], wish: Wish, all_layouts: bool) -> Iterator[str]:
    if not found:
        return
    met = [each for each in found if each.refused is None]
    refused = [each for each in found if each.refused is not None]
    slo = ", ".join(f"{name} <= {seconds * 1e3:g} ms" for name, seconds in wish.slo.items())
    rate = "as much as one replica can" if wish.rate is None else f"{wish.rate:g} requests/s"
    yield from ("", f"Layouts for {rate}{', ' if slo else ''}{slo}: the cheapest first")
    shown = met if all_layouts else met[:SHOWN]
    if shown:
        yield from _table([_layout(each) for each in shown])
    else:
        yield "none meets it."
    if len(met) > len(shown):
        yield f"and {len(met) - len(shown)} more (--all)"
    shown = refused if all_layouts else refused[:SHOWN]
    yield from (f"refused: {each.layout.label}: {each.refused}" for each in shown)
    if len(refused) > len(shown):
        yield f"and {len(refused) - len(shown)} more that are refused (--all)"


def _layout(each: Candidate) -> dict[str, str]:
    point = each.point
    assert point is not None
    return {
        "layout": f"{each.replicas} x {each.layout.label}",
        "GPUs": f"{each.gpus}",
        "$/hour": f"{each.dollars:,.2f}",
        "most of a replica": f"{each.most_rate:,.2f}/s",
        "TTFT p99": _ms(point.ttft_p99),
        "ITL p99": _ms(point.itl_p99),
        "budget": f"{each.budget:,}",
    }


def plan_json(report: Report, found: Sequence[Candidate]) -> dict[str, object]:
    """Every figure with its formula; seconds, bytes and dollars."""
    sized, fits = report.sized, report.misfit is None
    asked = report.replica.at(report.rate) if fits else None
    parts: Mapping[str, Sequence[Figure]] = {
        "memory": report.memory() if fits else (),
        "speed": report.speed() if fits else (),
        "cost": () if asked is None else report.cost(asked),
    }
    return {
        "model": sized.model.name,
        "gpu": dataclasses.asdict(report.gpu),
        "tensor_parallel_size": sized.layout.tensor_parallel,
        "replicas": report.replicas,
        "quantization": sized.layout.quantization,
        "kv_cache_dtype": sized.prepared.resolved.kv_cache_dtype,
        "max_model_len": sized.prepared.resolved.max_model_len,
        "prompt_tokens": report.wish.lengths.prompt,
        "output_tokens": report.wish.lengths.output,
        "rate": report.wish.rate,
        "slo": report.wish.slo,
        "kind": report.kind,
        "measured": None if report.cost_model is None else dict(report.cost_model.about),
        "fits": fits,
        "dry_run": sized.dry_run,
        "error": None if fits else str(report.misfit),
        **{name: [dataclasses.asdict(each) for each in rows] for name, rows in parts.items()},
        "batches": [dataclasses.asdict(row) for row in report.batches()] if fits else [],
        "load": [point._asdict() for point in report.points()] if fits else [],
        "layouts": [
            {
                "gpu": each.layout.gpu.name,
                "tensor_parallel_size": each.layout.tensor_parallel,
                "quantization": each.layout.quantization,
                "replicas": each.replicas,
                "gpus": each.gpus,
                "dollars_per_hour": each.dollars,
                "max_num_batched_tokens": each.budget,
                "most_rate_of_a_replica": each.most_rate,
                "point": None if each.point is None else each.point._asdict(),
                "refused": each.refused,
            }
            for each in found
        ],
        "sources": sources(),
    }


def _figures(figures: Sequence[Figure], formulas: bool) -> Iterator[str]:
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        yield f"{figure.name:<{width}}  {figure.shown:>18}"
        if formulas:
            yield f"    = {figure.formula}"


def _table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Aligned columns: words to the left, numbers to the right."""
    names = list(rows[0])
    cells = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    left = [rows[0][name][:1].isalpha() or " x " in rows[0][name] for name in names]
    for line in cells:
        yield "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"

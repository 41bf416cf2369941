"""`quire plan MODEL`: what fits GPUs, how fast it could be, what it costs, and which layout is cheapest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quire.cli.parser import Parser, add_options, given
from quire.config import engine_options
from quire.config.options import parse_size
from quire.errors import ConfigError
from quire.models.registry import resolve_spec
from quire.plan.devices import Gpu, find_gpu, gpu_names, parse_gpus
from quire.plan.fitted import FittedCost
from quire.plan.load import Lengths
from quire.plan.model import QUANTIZATIONS, Layout, Model, find_model, place
from quire.plan.picture import draw_plan
from quire.plan.report import Report
from quire.plan.search import FORMATS, Candidate, Wish, candidates, fewest_ranks, parse_slo
from quire.plan.text import plan_json, plan_text

OPTIONS = "dtype kv_cache_dtype block_size gpu_memory_utilization max_num_seqs max_num_batched_tokens".split()
"""Of the engine, that change what fits or how fast it is."""
DEFAULT_CONTEXT = 8192
MOST_TOKENS = 2**40
LEAST_RATE = 1e-6
"""Of requests a second; the most is its inverse."""


def run(argv: list[str]) -> int:
    args, options = _parsed(argv)
    model, lengths = find_model(args.model), Lengths(args.input, args.output)
    options["max_model_len"] = context = args.context or _context(model, lengths)
    if lengths.total > context:
        raise ConfigError(
            f"context {context} is less than input + output, {lengths.total}; raise --context, or lower "
            "--input or --output."
        )
    wish = Wish(lengths, args.rate, {} if args.slo is None else parse_slo(args.slo))
    names = gpu_names(every=False) if args.gpu == "any" else args.gpu.split(",")
    parsed = [parse_gpus(name) for name in names]
    gpus = [find_gpu(name, price=args.price) for name, _ in parsed]
    formats = _formats(model, args.quantization)
    searched = args.slo is not None or args.rate is not None
    searched = searched and args.cost is None
    found = candidates(model, gpus, formats, wish, options) if searched else []
    count = parsed[0][1]
    report = _report(model, gpus[0], count, formats[0], found, wish, options)
    if args.cost is not None:
        report = replace(report, cost_model=_fitted(args.cost, count))
    error = report.misfit
    if args.json:
        print(json.dumps(plan_json(report, found), indent=1))
    else:
        print(*plan_text(report, found, formulas=args.formulas, all_layouts=args.all), sep="\n")
    if error is not None:
        raise error
    if args.picture is not None:
        _write(args.picture, draw_plan(report, found, options))
    return 0


def _report(
    model: Model,
    gpu: Gpu,
    count: int | None,
    form: str | None,
    found: Sequence[Candidate],
    wish: Wish,
    options: dict[str, object],
) -> Report:
    """Of the layout that `--gpu` names with a number; else the cheapest; else the smallest that fits."""
    best = next((each for each in found if each.refused is None), None)
    if count is not None or best is None:
        ranks = count or fewest_ranks(model, gpu, form, options)
        return Report(place(model, Layout(gpu, ranks, form), options), wish)
    options = {**options, "max_num_batched_tokens": best.budget}
    return Report(place(model, best.layout, options), wish, best.replicas)


def _fitted(file: str, count: int | None) -> FittedCost:
    """count: of the GPUs that --gpu names."""
    cost = FittedCost.load(file)
    ranks = cost.about.get("tensor_parallel_size", count)
    if count is None or ranks != count:
        raise ConfigError(
            f"cost file {file} is of one layout, {ranks or 1} ranks; name it: --gpu GPU:{ranks or 1}."
        )
    if cost.about.get("device", "cuda") != "cuda":
        raise ConfigError(
            f"cost file {file} was measured on the device {cost.about['device']!r}, and --gpu names a GPU; "
            "quire simulate takes it."
        )
    return cost


def _formats(model: Model, wanted: str | None) -> Sequence[str | None]:
    if wanted is not None:
        return (None if wanted == "none" else wanted,)
    return (None,) if model.fields.get("quantization_config") else FORMATS


def _context(model: Model, lengths: Lengths) -> int:
    return max(lengths.total, min(DEFAULT_CONTEXT, resolve_spec(model.fields).context_length))


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"picture {path} cannot be written: {error.strerror}.") from None


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    parser = Parser(
        prog="quire plan",
        usage="quire plan [MODEL] --gpu GPU [flags]",
        description="Say what of a model fits GPUs that need not be here, how fast it could be, and what it "
        "costs. Needs no weights. With --rate or --slo, layouts are compared and the cheapest is found.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="a directory, a config.json, a hub id (its config.json is fetched), or a public model's name "
        "(default: the built-in model)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", metavar="GPU[:N][,GPU...]", default="any",
        help=f"{', '.join(gpu_names())}, or any (default: where Quire runs); N: one replica on so "
        "many, tensor parallel",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=_count, metavar="N",
        help="most tokens of a request: --max-model-len (default: 8k, or the model's if that is less)",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=_count, default=1000, metavar="N", help="tokens of a prompt (1000)"
    )
    parser.add_argument(
        "--output", type=_count, default=200, metavar="N", help="tokens of an answer (200)"
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="R", help="requests a second, of all replicas together"
    )
    parser.add_argument(
        "--slo", metavar="ttft=500ms,itl=50ms",
        help="p99 of TTFT, p99 of ITL, mean ITL (tpot) that must be met; each is optional",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", "-q", choices=("none", *QUANTIZATIONS), metavar="FORMAT",
        help=f"of the weights: none, {', '.join(QUANTIZATIONS)} (default: the checkpoint's; a search tries "
        "none, fp8 and awq)",
    )  # fmt: skip
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="of one GPU for an hour, not the table's"
    )
    parser.add_argument(
        "--formulas", action="store_true", help="print each number's formula with its values"
    )
    parser.add_argument("--all", action="store_true", help="print every layout, not only the first")
    parser.add_argument("--json", action="store_true", help="print JSON, with every formula")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw cost and ITL against the rate")
    parser.add_argument(
        "--cost",
        metavar="FILE",
        help="of quire bench fit, measured on such GPUs in this layout: predicts instead of estimating",
    )
    infos = [info for info in engine_options() if info.name in OPTIONS]
    add_options(parser, infos)
    args = parser.parse_strictly(argv)
    return args, given(args, infos)


def _count(text: str) -> int:
    value = parse_size(text)
    if not 1 <= value < MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MOST_TOKENS - 1:,}, got {text}")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST_RATE <= value <= 1 / LEAST_RATE:
        most = 1 / LEAST_RATE
        raise argparse.ArgumentTypeError(
            f"must be from {LEAST_RATE:g} to {most:,.0f}, got {text!r}"
        )
    return value

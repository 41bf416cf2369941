"""`quire bench sweep`: runs `serve` at rising load, to find where a server saturates."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from quire.bench.options import parse_goodput
from quire.cli.bench import add_bench_options, number_at_least, options_of
from quire.cli.bench_serve import progress
from quire.cli.parser import Parser
from quire.errors import ConfigError

COLUMNS = {
    "request_throughput": "req/s",
    "output_throughput": "out tok/s",
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "p99",
    "median_tpot_ms": "TPOT p50",
    "p99_tpot_ms": "p99",
    "median_e2el_ms": "E2EL p50",
    "failed": "failed",
}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench sweep",
        usage="quire bench sweep (--rates R ... | --concurrencies N ...) [flags]",
        description="Run `quire bench serve` once for each rate, or each concurrency.",
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--rates", nargs="+", metavar="R", help="requests per second; inf is all at once"
    )
    kind.add_argument("--concurrencies", nargs="+", metavar="N", help="requests in flight")
    parser.add_argument("--output-json", metavar="FILE", help="write every run's figures there")
    swept = (
        "request_rate",
        "save_result",
        "save_detailed",
        "result_dir",
        "result_filename",
        "label",
    )
    ramps = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "metadata")
    add_bench_options(parser, without=swept + ramps)
    args = parser.parse_strictly(argv)
    dataset = options_of(args, "dataset")
    server = options_of(args, "server", ignore_eos=dataset.dataset_name == "random")
    base = options_of(args, "load")
    report = options_of(args, "report")
    if args.concurrencies and base.max_concurrency is not None:
        raise ConfigError("max_concurrency is what --concurrencies sets; remove one.")
    axis, field, kinds = (
        ("rate", "request_rate", float) if args.rates else ("concurrency", "max_concurrency", int)
    )
    flag = "--rates" if args.rates else "--concurrencies"
    values = [number_at_least(flag, 0, kinds)(text) for text in args.rates or args.concurrencies]
    loads = [dataclasses.replace(base, **{field: value}) for value in values]
    if report.plot is not None:
        from quire.bench.plot import require_matplotlib

        require_matplotlib(report.plot)
    from quire.bench.datasets import load_requests
    from quire.bench.record import run_record
    from quire.bench.report import write_json
    from quire.bench.serve import find_target, run_serve

    target = find_target(server)
    points: list[dict[str, object]] = []
    print(f"{axis:>12} " + " ".join(f"{title:>10}" for title in COLUMNS.values()))
    for number, (value, load) in enumerate(zip(values, loads, strict=True)):
        # Each run has other prompts, so that none is in the server's prefix cache.
        seed = dataset.seed + number
        requests = load_requests(dataclasses.replace(dataset, seed=seed), target.tokenizer)
        with progress(len(requests), enabled=not report.disable_tqdm) as on_done:
            result = run_serve(
                target, requests, load, seed=seed, percentiles=sorted({99.0, *report.percentiles}),
                slos=parse_goodput(report.goodput), send_ids=dataset.prompt_token_ids, on_done=on_done,
            )  # fmt: skip
        shown = "inf" if value == math.inf else f"{value:g}"
        points.append({"load": shown, **result.figures})
        cells = [result.figures[key] for key in COLUMNS]
        print(f"{shown:>12} " + " ".join(f"{_cell(cell):>10}" for cell in cells), flush=True)
    if args.output_json:
        content = {"axis": axis, "model_id": target.model, "points": points}
        write_json(Path(args.output_json), content | {"record": run_record()})
    if report.plot is not None:
        from quire.bench.plot import plot_sweep

        plot_sweep(points, report.plot, title=f"{target.model} at {server.url}", axis=axis)
        print(f"picture: {report.plot}", file=sys.stderr)
    return 0 if all(point["completed"] for point in points) else 1


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)

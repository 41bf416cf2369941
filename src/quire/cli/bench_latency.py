"""`quire bench latency`: the time that the engine takes for one batch of a fixed size."""

from __future__ import annotations

from pathlib import Path

from quire.cli.bench import number_at_least
from quire.cli.bench_engine import add_engine_flags, make_llm
from quire.cli.parser import Parser

COUNTS = {
    "--input-len": (32, 1, "prompt tokens of each request"),
    "--output-len": (128, 1, "output tokens of each"),
    "--batch-size": (8, 1, "requests at once"),
    "--n": (1, 1, "sequences per request"),
    "--num-iters-warmup": (10, 0, "batches that are not counted"),
    "--num-iters": (30, 1, "batches that are"),
    "--seed": (0, 0, "of the prompts"),
}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench latency",
        usage="quire bench latency [flags]",
        description="Time one batch from its submission to its last token, again and again.",
    )
    for flag, (default, least, text) in COUNTS.items():
        parser.add_argument(
            flag,
            type=number_at_least(flag, least, int),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    add_engine_flags(parser)
    args = parser.parse_strictly(argv)
    from quire.bench.offline import latency
    from quire.bench.record import run_record
    from quire.bench.report import write_json

    names = [flag[2:].replace("-", "_") for flag in COUNTS]
    with make_llm(args) as llm:
        figures = latency(llm, **{name: getattr(args, name) for name in names})
    print(f"Avg latency: {figures['avg_latency']} seconds")
    percentiles = figures["percentiles"]
    assert isinstance(percentiles, dict)
    for name, value in percentiles.items():
        print(f"{name}% percentile latency: {value} seconds")
    if args.output_json:
        write_json(Path(args.output_json), figures | {"record": run_record()})
    return 0

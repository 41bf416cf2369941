"""`quire bench startup`: the time until `quire --help`, until the model is loaded, until ready, and to
the first token."""

from __future__ import annotations

from pathlib import Path

from quire.cli.bench import number_at_least
from quire.cli.bench_engine import add_engine_flags, engine_values
from quire.cli.parser import Parser

ABOUT = {
    "python": "an empty Python",
    "import_quire": "python -c 'import quire'",
    "help": "quire --help",
    "import_torch": "python -c 'import torch'",
    "engine_import": "in the engine's process: imports",
    "engine_load": "    LLM(...): torch, the weights",
    "engine_first_token": "    the first token",
    "engine_process": "    from its launch to its end",
    "server_ready": "quire serve, launch to /ready",
    "server_first_token": "    launch to the first token",
    "server_shutdown": "    SIGTERM to its end",
}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench startup",
        usage="quire bench startup [flags]",
        description="Time imports, loading and a server's start in fresh processes; medians.",
    )
    parser.add_argument(
        "--runs",
        type=number_at_least("--runs", 1, int),
        default=5,
        metavar="N",
        help="(default: 5)",
    )
    parser.add_argument(
        "--cold-kernels", action="store_true", help="compile the C kernels anew in each run"
    )
    add_engine_flags(parser)
    args = parser.parse_strictly(argv)
    from quire.bench.record import run_record
    from quire.bench.report import write_json
    from quire.bench.startup import measure_startup, medians
    from quire.config import from_flat

    engine = engine_values(args)
    from_flat(engine)  # reports a mistake before anything is started
    seconds = measure_startup(engine, runs=args.runs, cold_kernels=args.cold_kernels)
    middle = medians(seconds)
    print(f"{'seconds, median of ' + str(args.runs):<36}{'median':>9}{'least':>9}{'most':>9}")
    for name, values in seconds.items():
        print(f"{ABOUT[name]:<36}{middle[name]:>9.3f}{min(values):>9.3f}{max(values):>9.3f}")
    if args.output_json:
        content = {"medians": middle, "seconds": seconds, "cold_kernels": args.cold_kernels}
        write_json(Path(args.output_json), content | {"record": run_record()})
    return 0

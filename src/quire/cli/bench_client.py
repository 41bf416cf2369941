"""`quire bench client`: measures whether the load generator is the bottleneck on this machine."""

from __future__ import annotations

from pathlib import Path

from quire.cli.bench import number_at_least
from quire.cli.parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench client",
        usage="quire bench client [flags]",
        description="Drive the null server as fast as it goes, and at a pace, and show the client's error.",
    )
    count = number_at_least
    parser.add_argument(
        "--requests",
        type=count("--requests", 1, int),
        default=16000,
        help="of one chunk (default: 16000)",
    )
    parser.add_argument(
        "--concurrency",
        type=count("--concurrency", 1, int),
        default=64,
        help="in flight (default: 64)",
    )
    parser.add_argument(
        "--rate", type=count("--rate", 0.01), default=50.0, help="of the paced part (default: 50)"
    )
    parser.add_argument(
        "--seconds",
        type=count("--seconds", 0.01),
        default=5.0,
        help="of the paced part (default: 5)",
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there")
    args = parser.parse_strictly(argv)
    from quire.bench.record import run_record
    from quire.bench.report import write_json
    from quire.bench.self_check import check_client

    rows = check_client(
        requests=args.requests, concurrency=args.concurrency, rate=args.rate, seconds=args.seconds
    )
    for row in rows:
        print(f"-- {row['check']}")
        for name, value in row.items():
            if isinstance(value, float):
                print(f"{name:<28}{value:,.3f}" if value < 1000 else f"{name:<28}{value:,.0f}")
            elif name == "failed" and value:
                print(f"{name:<28}{value}")
    if args.output_json:
        write_json(Path(args.output_json), {"checks": rows, "record": run_record()})
    return 1 if any(row["failed"] for row in rows) else 0

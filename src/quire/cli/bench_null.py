"""`quire bench null-server`: a server without a model that sends chunks on a schedule, to measure load
generators."""

from __future__ import annotations

from quire.cli.bench import number_at_least
from quire.cli.parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench null-server",
        usage="quire bench null-server [flags]",
        description="Answer completion requests at once, or on a schedule, with text of no meaning.",
    )
    seconds = number_at_least
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=number_at_least("--port", 0, int),
        default=8000,
        help="0 picks one (default: 8000)",
    )
    parser.add_argument(
        "--chunks",
        type=number_at_least("--chunks", 0, int),
        help="per answer (default: max_tokens)",
    )
    parser.add_argument(
        "--interval", type=seconds("--interval", 0.0), default=0.0, help="seconds between chunks"
    )
    parser.add_argument(
        "--first", type=seconds("--first", 0.0), default=0.0, help="seconds before the first chunk"
    )
    parser.add_argument(
        "--stamp", action="store_true", help="text is the clock at the write, in nanoseconds"
    )
    args = parser.parse_strictly(argv)
    from quire.bench.load import run_async
    from quire.bench.null_server import NullOptions, serve_null

    options = NullOptions(args.chunks, args.interval, args.first, stamp=args.stamp)

    def ready(port: int) -> None:
        print(f"http://{args.host}:{port}", flush=True)

    run_async(serve_null(options, host=args.host, port=args.port, on_ready=ready))
    return 0

"""`quire chaos`: disturbs a server that it starts itself, and checks that nothing is lost, wrong or left."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.bench import number_at_least
from quire.cli.parser import Parser

if TYPE_CHECKING:  # `quire --help` does not import what a run needs
    from quire.bench.chaos.report import Report


def run(argv: list[str]) -> int:
    """0: no violation, 1: at least one."""
    parser = Parser(
        prog="quire chaos",
        usage="quire chaos [MODEL] [flags]",
        description=(
            "Start a server, strike it with faults under load, and check after each that every request\n"
            "ended once, that answers are those of an undisturbed server, and that nothing is held or left."
        ),
    )
    parser.add_argument("model", nargs="?", default="", help="default: the built-in model")
    parser.add_argument(
        "--duration", default="5m", metavar="TIME", help="30s, 5m, 1h (default: 5m)"
    )
    parser.add_argument(
        "--seed", type=number_at_least("--seed", 0, int), default=0, metavar="N",
        help="of the order of faults and of what they choose (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--faults",
        default="",
        metavar="NAMES",
        help="only these, separated by commas (default: all)",
    )
    parser.add_argument(
        "--concurrency", type=number_at_least("--concurrency", 1, int), default=6, metavar="N",
        help="requests in flight beside those of the fault (default: 6)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=number_at_least("--tensor-parallel-size", 1, int), default=1,
        metavar="N", help="as of quire serve; with 2 or more, worker ranks are killed too (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--output-json", metavar="FILE", help="write all that was done and found there"
    )
    parser.add_argument(
        "--folder", default="", metavar="DIR", help="keep the server's logs and files there"
    )
    args = parser.parse_strictly(argv)
    from quire.bench.chaos.faults import create_faults
    from quire.bench.chaos.options import ChaosOptions, parse_duration
    from quire.bench.chaos.run import run_chaos
    from quire.bench.report import write_json

    options = ChaosOptions(
        seconds=parse_duration(args.duration),
        seed=args.seed,
        faults=tuple(name for name in args.faults.split(",") if name),
        concurrency=args.concurrency,
        model=args.model,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    create_faults(options.faults)  # reports a mistake before anything is started
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    place = (
        nullcontext(args.folder)
        if args.folder
        else tempfile.TemporaryDirectory(prefix="quire-chaos-")
    )
    with place as folder:
        running = run_chaos(options, Path(folder).resolve(), lambda line: print(line, flush=True))
        try:
            report = asyncio.run(_until_terminated(running))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
    if args.output_json:
        write_json(Path(args.output_json), report.as_json())
    print(report.as_text())
    return 1 if report.violations else 0


async def _until_terminated(running: Coroutine[Any, Any, Report]) -> Report:
    """SIGTERM ends it as Ctrl-C does: the server and its mounts are taken away."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await running

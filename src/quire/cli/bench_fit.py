"""`quire bench fit`: measures the steps of an engine, and writes a file of what they take."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from quire.cli.bench import number_at_least
from quire.cli.bench_engine import add_engine_flags, engine_values
from quire.cli.parser import Parser

if TYPE_CHECKING:
    from quire.bench.fit_grid import Cell

KINDS = {"decode": "rows alone", "prefill": "prompts alone", "mixed": "both", "all": "all steps"}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench fit",
        usage="quire bench fit [flags] -o FILE",
        description="Time a grid of steps of the engine, fit what a step takes, and write it to a file for "
        "quire simulate, quire plan and quire serve --cost-model. The error is that of steps that were not "
        "fitted.",
    )
    parser.add_argument(
        "-o", "--output", default="cost.json", metavar="FILE", help="(default: cost.json)"
    )
    parser.add_argument(
        "--rounds",
        type=number_at_least("--rounds", 1, int),
        default=1,
        metavar="N",
        help="times that the grid is measured; medians count (default: 1)",
    )
    add_engine_flags(parser)
    args = parser.parse_strictly(argv)
    from quire.bench.fit import fit, table
    from quire.bench.report import write_json

    began = perf_counter()
    cells, about = _measured(args)
    cost = fit(cells, about=about)
    print("\n".join(table(cost, cells)))
    print(
        f"\n{len(cells)} kinds of steps in {perf_counter() - began:.0f} s. Held out, the mean error is"
    )
    for kind, error in cost.errors.items():
        print(f"  {KINDS[kind]:<14}{error:>7.1%}")
    write_json(Path(args.output), cost.content())
    if args.output_json:
        steps = [
            {"kind": cell.kind, "seconds": cell.seconds} | cell.work._asdict() for cell in cells
        ]
        write_json(Path(args.output_json), cost.content() | {"steps": steps})
    print(f"Written to {args.output}.")
    return 0


def _measured(args: argparse.Namespace) -> tuple[list[Cell], dict[str, object]]:
    """The cells, and where they were measured."""
    from quire.bench.fit import facts
    from quire.bench.fit_grid import Grid
    from quire.config import from_flat
    from quire.engine.assemble import build_core
    from quire.engine.setup import locate, resolve

    config = locate(from_flat(engine_values(args) | {"enable_prefix_caching": True}))
    resolved = resolve(config)
    core, ready = build_core(config, resolved)
    gc.freeze()  # as a server's core
    try:
        grid = Grid(core, vocab_size=resolved.spec.vocab_size, longest=ready.max_model_len)
        cells = grid.measure(args.rounds)
    finally:
        core.close()
    return cells, facts(config, resolved)

"""`quire bench serve`: puts load on a server; prints a table, and writes JSON and a picture if asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.bench.options import parse_goodput
from quire.cli.bench import add_bench_options, options_of
from quire.cli.parser import Parser

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.bench.client import Exchange


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench serve",
        usage="quire bench serve [flags]",
        description="Send requests to an OpenAI-compatible server, and measure what comes back.",
    )
    add_bench_options(parser)
    args = parser.parse_strictly(argv)
    dataset = options_of(args, "dataset")
    # As in vLLM: random words make models stop early, so that servers would do different amounts of work.
    defaults: dict[str, object] = {"ignore_eos": dataset.dataset_name in ("random", "agents")}
    agents = dataset.dataset_name == "agents"
    if agents and not dataset.prompt_token_ids and "endpoint" not in args:
        defaults["backend"] = "openai-chat"  # what an agent speaks
    target_options = options_of(args, "server", **defaults)
    load = options_of(args, "load")
    report = options_of(args, "report")
    if report.plot is not None:
        from quire.bench.plot import require_matplotlib

        require_matplotlib(report.plot)  # fail now, not after an hour of measuring

    from quire.bench.datasets import load_requests
    from quire.bench.report import result_json, result_path, table, write_json
    from quire.bench.serve import find_target, run_agents, run_serve

    target = find_target(target_options)
    path = result_path(target, load, report)
    slos = parse_goodput(report.goodput)
    if agents:
        num_turns = dataset.agents_sessions * dataset.agents_turns
        with progress(num_turns, enabled=not report.disable_tqdm) as on_done:
            result = run_agents(
                target, dataset, load, percentiles=report.percentiles, slos=slos, on_done=on_done
            )
    else:
        requests = load_requests(dataset, target.tokenizer)
        with progress(len(requests), enabled=not report.disable_tqdm) as on_done:
            result = run_serve(
                target,
                requests,
                load,
                seed=dataset.seed,
                percentiles=report.percentiles,
                slos=slos,
                send_ids=dataset.prompt_token_ids,
                on_done=on_done,
            )
    print(table(result, load, report))
    if report.save_result or report.save_detailed:
        write_json(path, result_json(result, target, load, report))
        print(f"result: {path}", file=sys.stderr)
    if report.plot is not None:
        from quire.bench.plot import plot_run

        plot_run(result, report.plot, title=f"{target.model} at {target.options.url}")
        print(f"picture: {report.plot}", file=sys.stderr)
    return 0 if result.figures["completed"] else 1


@contextmanager
def progress(total: int, *, enabled: bool = True) -> Iterator[Callable[[Exchange], None]]:
    """A progress bar on stderr if that is a terminal. The function that it gives counts one request."""
    if not enabled or not sys.stderr.isatty():
        yield lambda exchange: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="req", dynamic_ncols=True) as bar:
        yield lambda exchange: bar.update(1) and None

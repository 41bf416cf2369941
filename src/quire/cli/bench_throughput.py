"""`quire bench throughput`: tokens per second on a dataset, with all requests submitted at once."""

from __future__ import annotations

import sys
from pathlib import Path

from quire.cli.bench import add_bench_options, number_at_least, options_of
from quire.cli.bench_engine import add_engine_flags, engine_values
from quire.cli.parser import Parser
from quire.config import canonical, engine_options, from_flat
from quire.errors import ConfigError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench throughput",
        usage="quire bench throughput [flags]",
        description="Generate for a whole dataset at once, without a server.",
    )
    parser.add_argument(
        "--n",
        type=number_at_least("--n", 1, int),
        default=1,
        help="sequences per prompt (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        type=number_at_least("--temperature", 0.0),
        default=1.0,
        help="of sampling (default: 1.0, as vLLM's)",
    )
    parser.add_argument(
        "--compare-speculation",
        type=number_at_least("--compare-speculation", 1, int),
        metavar="ROUNDS",
        help="run so often with and without speculation, by turns; print both, and the ratio",
    )
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    add_bench_options(parser, "dataset")
    add_engine_flags(parser)
    args = parser.parse_strictly(argv)
    dataset = options_of(args, "dataset")
    from quire.bench.datasets import load_requests
    from quire.bench.offline import compare, throughput
    from quire.bench.record import run_record
    from quire.bench.report import write_json
    from quire.engine.llm import LLM

    values = engine_values(args)
    if args.compare_speculation and from_flat(values).speculative.speculation is None:
        raise ConfigError(
            "compare_speculation needs speculation: --spec-method suffix, for example."
        )
    with LLM(**values) as llm:  # type: ignore[arg-type]
        requests = load_requests(dataset, llm.model.tokenizer)

        def run(engine: LLM) -> dict[str, object]:
            return throughput(
                engine,
                requests,
                n=args.n,
                temperature=args.temperature,
                show_progress=sys.stderr.isatty() and not args.disable_tqdm,
            )

        if args.compare_speculation is None:
            figures = run(llm)
        else:
            with LLM(**without_speculation(values)) as plain:  # type: ignore[arg-type]
                figures = compare(plain, llm, run, args.compare_speculation)
    _print(figures)
    if args.output_json:
        write_json(Path(args.output_json), figures | {"record": run_record()})
    return 0


def without_speculation(values: dict[str, object]) -> dict[str, object]:
    own = {info.name for info in engine_options() if info.group == "speculative"}
    return {name: value for name, value in canonical(values).items() if name not in own}


def _print(figures: dict[str, object]) -> None:
    plain = figures.get("without_speculation")
    for title, each in (("Throughput: ", figures), ("Without speculation: ", plain)):
        if isinstance(each, dict):
            print(
                f"{title}{each['requests_per_second']:.2f} requests/s, "
                f"{each['tokens_per_second']:.2f} total tokens/s, "
                f"{each['output_tokens_per_second']:.2f} output tokens/s"
            )
    if plain is not None:
        print(f"With speculation / without: {figures['speculation_ratio']:.3f}")
    print(f"Total num prompt tokens:  {figures['total_prompt_tokens']}")
    print(f"Total num output tokens:  {figures['total_output_tokens']}")

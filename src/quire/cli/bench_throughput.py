"""`quire bench throughput`: tokens per second on a dataset, with all requests submitted at once."""

from __future__ import annotations

import sys
from pathlib import Path

from quire.cli.bench import add_bench_options, number_at_least, options_of
from quire.cli.bench_engine import add_engine_flags, make_llm
from quire.cli.parser import Parser


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
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    add_bench_options(parser, "dataset")
    add_engine_flags(parser)
    args = parser.parse_strictly(argv)
    dataset = options_of(args, "dataset")
    from quire.bench.datasets import load_requests
    from quire.bench.offline import throughput
    from quire.bench.record import run_record
    from quire.bench.report import write_json

    with make_llm(args) as llm:
        requests = load_requests(dataset, llm.model.tokenizer)
        figures = throughput(
            llm,
            requests,
            n=args.n,
            temperature=args.temperature,
            show_progress=sys.stderr.isatty() and not args.disable_tqdm,
        )
    print(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {figures['total_prompt_tokens']}")
    print(f"Total num output tokens:  {figures['total_output_tokens']}")
    if args.output_json:
        write_json(Path(args.output_json), figures | {"record": run_record()})
    return 0

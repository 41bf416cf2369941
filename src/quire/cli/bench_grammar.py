"""`quire bench grammar`: the cost of structured output, per grammar and per token."""

from __future__ import annotations

from pathlib import Path

from quire.cli.bench import number_at_least
from quire.cli.parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench grammar",
        usage="quire bench grammar [flags]",
        description="Time compiling and masks for some schemas, a regex, a grammar and tags.",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="whose vocabulary (default: the built-in model's)"
    )
    parser.add_argument(
        "--num-tokens", type=number_at_least("--num-tokens", 1, int), default=1000, metavar="N",
        help="masks per grammar (default: 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=number_at_least("--repeats", 1, int), default=5, metavar="N",
        help="compilations per grammar, of which the median counts (default: 5)",
    )  # fmt: skip
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there")
    args = parser.parse_strictly(argv)
    from quire.bench.grammar import measure, table
    from quire.bench.record import PACKAGES, run_record
    from quire.bench.report import write_json
    from quire.builtin import MODEL_DIR
    from quire.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(Path(args.tokenizer or MODEL_DIR))
    end = tokenizer.eos_token_id
    rows = measure(
        tokenizer,
        eos_token_ids=[tokenizer.max_token_id if end is None else end],
        num_tokens=args.num_tokens,
        repeats=args.repeats,
    )
    print(table(rows))
    if args.output_json:
        record = run_record(packages=(*PACKAGES, "llguidance"))
        write_json(Path(args.output_json), {"grammars": rows, "record": record})
    return 0

"""`quire bench dataset`: the sharegpt-synthetic requests as a ShareGPT file, for other tools."""

from __future__ import annotations

from pathlib import Path

from quire.builtin import MODEL_NAME
from quire.cli.bench import number_at_least
from quire.cli.parser import Parser
from quire.errors import ConfigError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench dataset",
        usage="quire bench dataset FILE [flags]",
        description="Write a file in ShareGPT's form, with its lengths and words of no meaning.",
    )
    parser.add_argument("file", metavar="FILE")
    count = number_at_least
    parser.add_argument(
        "--num-prompts", type=count("--num-prompts", 1, int), default=1000, help="(default: 1000)"
    )
    parser.add_argument("--seed", type=count("--seed", 0, int), default=0, help="(default: 0)")
    parser.add_argument(
        "--tokenizer",
        default=MODEL_NAME,
        help=f"that lengths are counted by (default: {MODEL_NAME})",
    )
    args = parser.parse_strictly(argv)
    from quire.bench.datasets.sharegpt import to_file
    from quire.bench.options import DatasetOptions
    from quire.bench.serve import load_tokenizer

    options = DatasetOptions(
        dataset_name="sharegpt-synthetic", num_prompts=args.num_prompts, seed=args.seed
    )
    text = to_file(options, load_tokenizer(args.tokenizer))
    try:
        Path(args.file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.file} cannot be written: {error.strerror}.") from None
    return 0

"""`quire bench kernels`: Quire's CPU kernels against PyTorch's, one operation at a time."""

from __future__ import annotations

from pathlib import Path

from quire.cli.bench import number_at_least
from quire.cli.parser import Parser
from quire.dtypes import FLOATS

SHAPES = {
    "hidden": (1024, "hidden size"),
    "ffn": (3072, "width of the MLP"),
    "q_heads": (16, "query heads"),
    "kv_heads": (8, "key and value heads"),
    "head_dim": (128, "size of a head"),
    "vocab": (32000, "scores per row to sample from"),
    "context": (512, "keys per row in attention"),
}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire bench kernels",
        usage="quire bench kernels [flags]",
        description="Time each CPU kernel and its PyTorch reference; by default a 0.6B model's shapes.",
    )
    for name, (default, text) in SHAPES.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag,
            type=number_at_least(flag, 1, int),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    count = number_at_least
    parser.add_argument(
        "--rows", nargs="+", type=count("--rows", 1, int), default=[1, 8, 64], metavar="N",
        help="tokens at once (default: 1 8 64)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=count("--repeats", 1, int), default=20, metavar="N", help="(default: 20)"
    )
    parser.add_argument(
        "--dtype", choices=FLOATS, default="bfloat16",
        help="(default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--cpu-threads", type=count("--cpu-threads", 1, int), help="(default: physical cores)"
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there")
    args = parser.parse_strictly(argv)
    import torch

    from quire.bench.kernels import Shapes, compare, table
    from quire.bench.record import run_record
    from quire.bench.report import write_json

    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    rows = []
    with torch.inference_mode():
        for count_of_rows in args.rows:
            shapes = Shapes(rows=count_of_rows, **{name: getattr(args, name) for name in SHAPES})
            dtype = getattr(torch, args.dtype)
            measured = compare(shapes, dtype=dtype, repeats=args.repeats)
            print(f"-- {count_of_rows} rows, {args.dtype}, {torch.get_num_threads()} threads")
            print(table(measured))
            rows += measured
    if args.output_json:
        facts = {"threads": torch.get_num_threads(), "dtype": args.dtype, "kernels": rows}
        write_json(Path(args.output_json), facts | {"record": run_record()})
    return 0

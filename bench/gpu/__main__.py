"""Check and measure Quire on one GPU.

    PYTHONPATH=src python -m bench.gpu [check] [kernels] [engine] [profile] --out DIR
    PYTHONPATH=src python -m bench.gpu first-hour --out DIR

Without a part, the four of the first line. Writes DIR/gpu.json after every case and DIR/gpu.md at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.report import markdown
from bench.gpu.suite import Options, run_part

from quire.bench.record import run_record

PARTS = ("check", "kernels", "engine", "profile")
FIRST = "first-hour"
"""What a device is asked first: bits of all parts, in an order of its own."""
MODELS = ("qwen-0.6b", "llama-8b")
PACKAGES = ("torch", "triton", "numpy", "transformers", "msgspec")


def main() -> int:
    args = parse(sys.argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu.json"
    record = run_record(["python", "-m", "bench.gpu", *sys.argv[1:]], packages=PACKAGES)
    file.write_text(
        json.dumps({"record": record, "sizes": args.sizes, "note": args.note, "entries": []})
    )
    options = Options(tuple(args.models), args.sizes, time.time() + args.seconds, args.only)
    for part in (*(() if args.only else ("machine",)), *args.parts):
        run_part(part, f"bench.gpu.{part.replace('-', '_')}", file, options)
    results = json.loads(file.read_text())
    (args.out / "gpu.md").write_text(markdown(results))
    print(markdown(results))
    return int(any(entry["status"] not in ("ok", "skipped") for entry in results["entries"]))


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join((FIRST, *PARTS))}")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", dest="sizes", action="store_const", const="quick", default="full",
        help="shorter workloads",
    )  # fmt: skip
    sizes.add_argument(
        "--smoke", dest="sizes", action="store_const", const="smoke",
        help="tiny shapes; with TRITON_INTERPRET=1 on a CPU. The figures mean nothing",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=570, help="of all of it (default: 570)")
    parser.add_argument("--only", default="", metavar="NAME", help="cases with this in their names")
    parser.add_argument("--note", default="", help="kept in the JSON: the commit, say")
    args = parser.parse_args(words)
    every = (FIRST, *PARTS)
    unknown = sorted(set(args.parts) - set(every))
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(every)}")
    args.parts = [part for part in every if part in args.parts] or list(PARTS)
    return args


if __name__ == "__main__":
    sys.exit(main())

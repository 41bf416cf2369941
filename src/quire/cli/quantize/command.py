"""The flags of `quire quantize`, and what it prints."""

from __future__ import annotations

import shutil
from pathlib import Path

from quire.builtin import MODEL_DIR, MODEL_NAME
from quire.cli.parser import Parser
from quire.cli.quantize.plan import SCHEMES, Choice, Plan, make_plan
from quire.errors import ConfigError
from quire.models.registry import resolve_spec, text_config
from quire.quantization.unquantized import UNQUANTIZED
from quire.util.logging import setup_logging
from quire.weights.resolve import resolve_model
from quire.weights.source import Checkpoint, open_source


def run(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_strictly(argv)
    choice = Choice(args.scheme, args.group_size, args.asym, tuple(args.ignore), args.head)
    if choice.group_size is not None and choice.group_size < 1 and choice.group_size != -1:
        parser.error(f"--group-size is {choice.group_size}; use 128, 64, 32, or -1 for all inputs")
    setup_logging(log_format="text", level="WARNING")
    source = MODEL_DIR if args.model == MODEL_NAME else resolve_model(args.model)
    target = Path(args.out).expanduser()
    if not source.is_dir():
        raise ConfigError(f"{source} is a file; only a directory with safetensors is quantized")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; name a directory that is new or empty")
    opened = open_source(source)
    config = opened.config()
    spec = resolve_spec(text_config(config))
    if text_config(config) is not config:
        raise ConfigError(f"{args.model} is a multimodal model; only text models are quantized")
    if spec.quantization != UNQUANTIZED:
        raise ConfigError(f"{args.model} is quantized already; use its unquantized checkpoint")
    with opened.open() as checkpoint:
        plan = make_plan(config, spec, checkpoint.tensors, choice)
        original = sum(info.num_bytes for info in checkpoint.tensors.values())
        print(f"{plan.label}: {plan.num_quantized} of {plan.num_matrices} matrices")
        if choice.head == "w8" and spec.tie_word_embeddings:
            print(
                "The head gets a matrix of its own beside the embedding: they are no longer tied."
            )
        _print_sizes(plan, original)
        if args.dry_run:
            return 0
        _write(plan, checkpoint, source, target)
    if not args.skip_comparison:
        _print_comparison(source, target)
    print(f"Written to {target}. Serve it: quire serve {args.out}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="quire quantize",
        usage="quire quantize MODEL OUT --scheme SCHEME [flags]",
        description="Write a quantized checkpoint (compressed-tensors), which Quire, vLLM and transformers "
        "read.\nNo data are needed: weights are rounded to the nearest, with a search for the best scales.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"directory, hub id, or {MODEL_NAME}")
    parser.add_argument("out", metavar="OUT", help="a new directory")
    parser.add_argument(
        "--scheme", choices=SCHEMES, required=True,
        help="w4a16: int4 in groups; w8a16: int8, a scale for each output; fp8: E4M3, the same",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, metavar="N",
        help="inputs that share a scale; -1: all (default: w4a16 128, or 64 or 32 if that divides; w8a16 -1)",
    )  # fmt: skip
    parser.add_argument(
        "--asym", action="store_true", help="a zero for each group, besides its scale"
    )
    parser.add_argument(
        "--ignore", metavar="RE", action="append", default=[],
        help="leave layers whose name matches unquantized (can be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=("keep", "w8"), default="keep",
        help="the output layer: as it is, or int8 (which unties it from the embedding)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the sizes, write nothing")
    parser.add_argument(
        "--skip-comparison", action="store_true", help="do not run both models to compare them"
    )
    return parser


def _write(plan: Plan, checkpoint: Checkpoint, source: Path, target: Path) -> None:
    from tqdm import tqdm

    from quire.cli.quantize.write import write_checkpoint

    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    total = sum(step.source.num_bytes for step in plan.steps)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing") as bar:
            write_checkpoint(plan, checkpoint, source, target, bar.update)
    except BaseException:
        if created:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _print_sizes(plan: Plan, original: int) -> None:
    weights = plan.num_weights
    print(f"{'':14}{'original':>10}  {'quantized':>10}")
    print(f"{'size':14}{_size(original):>10}  {_size(plan.num_bytes):>10}")
    bits = [8 * count / weights for count in (original, plan.num_bytes)]
    print(f"{'bits/weight':14}{bits[0]:10.2f}  {bits[1]:10.2f}")


def _print_comparison(source: Path, target: Path) -> None:
    from quire.cli.quantize.compare import compare

    found = compare(source, target)
    print(f"{'perplexity':14}{found.original_perplexity:10.3f}  {found.perplexity:10.3f}")
    print(f"{'KL divergence':14}{'':10}  {found.kl:10.5f}")
    print(f"{'same top-1':14}{'':10}  {found.top1:10.1%}")
    print(f"(on {found.num_tokens} tokens of built-in text)")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"

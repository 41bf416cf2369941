"""Engine flags for the benchmarks that run the model in this process, and the model made from them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quire.cli.parser import Parser, add_options, given
from quire.config import engine_options, load_yaml
from quire.util.logging import setup_logging

if TYPE_CHECKING:
    from quire.engine.llm import LLM

_OPTIONS = [info for info in engine_options() if info.name not in ("seed", "model")]


def add_engine_flags(parser: Parser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="directory or hub id (default: built in)")
    parser.add_argument("--config", metavar="FILE", help="YAML file of engine options")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there")
    add_options(parser, _OPTIONS)


def engine_values(args: argparse.Namespace) -> dict[str, object]:
    """Flat engine options: flags over the YAML file."""
    setup_logging(log_format="text", level="WARNING")
    values = load_yaml(args.config) if args.config else {}
    values |= given(args, _OPTIONS)
    if args.model is not None:
        values["model"] = args.model
    return values


def make_llm(args: argparse.Namespace) -> LLM:
    values = engine_values(args)
    from quire.engine.llm import LLM

    return LLM(**values)  # type: ignore[arg-type]

"""`quire serve [MODEL]`: the HTTP server, configured from flags over a YAML file over defaults."""

from __future__ import annotations

import argparse

from quire.cli.parser import Parser, add_options, given
from quire.config import (
    EngineConfig,
    ServerConfig,
    engine_options,
    load_yaml,
    server_options,
    split_flat,
)
from quire.util.logging import setup_logging


def run(argv: list[str]) -> int:
    engine, server = configs(argv)
    setup_logging(log_format=engine.runtime.log_format)
    from quire.engine.core_client import CoreProcess

    # First of all: it imports torch while this process imports the HTTP server.
    core = CoreProcess(kernels=engine.runtime.kernels)
    try:
        from quire.server.run import serve

        return serve(engine, server, core)
    finally:
        core.close()


def configs(argv: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """Both configs, from the words after `quire serve`."""
    infos = [*engine_options(), *server_options()]
    parser = Parser(
        prog="quire serve",
        usage="quire serve [MODEL] [flags]",
        description="Serve a model over HTTP, in OpenAI's dialect.",
    )
    parser.add_argument(
        "model_positional",
        metavar="MODEL",
        nargs="?",
        help="local directory or hub id (default: the built-in model)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of these options; flags given here win"
    )
    add_options(parser, infos)
    args = parser.parse_strictly(argv)
    values = load_yaml(args.config) if args.config else {}
    values |= given(args, infos)
    return split_flat(with_model(values, args))


def with_model(values: dict[str, object], args: argparse.Namespace) -> dict[str, object]:
    """`values` with the positional MODEL, which wins over `--model`, as in vLLM."""
    if args.model_positional is not None:
        values["model"] = args.model_positional
    return values

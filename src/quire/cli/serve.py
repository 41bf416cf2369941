"""`quire serve [MODEL]`: the HTTP server. Flags take precedence over a YAML file, and that over defaults."""

from __future__ import annotations

import logging

from quire.cli.parser import Parser, parse_options
from quire.config import EngineConfig, ServerConfig, engine_options, server_options, split_flat
from quire.util.logging import setup_logging

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    values, notes = _given(argv)
    engine, server = split_flat(values)
    setup_logging(log_format=engine.runtime.log_format)
    for note in notes:
        logger.warning(note)
    if engine.parallel.node_rank:
        from quire.engine.node import run_node

        return run_node(engine)
    from quire.engine.replica_cores import start_cores

    # Start it first: it imports torch while this process imports the HTTP server.
    core = start_cores(engine)
    try:
        from quire.server.run import serve

        return serve(engine, server, core)
    finally:
        core.close()


def configs(argv: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """The engine's and the server's config, from the words after `quire serve`."""
    return split_flat(_given(argv)[0])


def _given(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """The options that were set, and the warnings about vLLM's among them."""
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
        help="local directory, GGUF file or hub id (default: the built-in model)",
    )
    args, values, notes = parse_options(parser, infos, argv)
    if args.model_positional is not None:  # it takes precedence over --model, as in vLLM
        values["model"] = args.model_positional
    return values, notes

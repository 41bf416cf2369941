"""`quire serve [MODEL]`: the HTTP server. Flags take precedence over a YAML file, and that over defaults."""

from __future__ import annotations

import argparse
import logging

from quire.cli.parser import Parser, parse_options
from quire.config import EngineConfig, ServerConfig, engine_options, server_options, split_flat
from quire.config.options import parse_size
from quire.errors import ConfigError
from quire.util.logging import setup_logging

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    args, values, notes = _parsed(argv)
    engine, server = split_flat(values)
    if args.dry_run:
        return _dry_run(engine, args)
    for flag in ("hf_config", "device_memory"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} is for --dry-run.")
    setup_logging(log_format=engine.runtime.log_format)
    for note in notes:
        logger.warning(note)
    if engine.parallel.node_rank:
        from quire.engine.node import run_node

        return run_node(engine)
    from quire.engine.replica_cores import ReplicaCores

    # Start it first: it imports torch while this process imports the HTTP server.
    core = ReplicaCores(engine, restarts=True)
    try:
        from quire.server.run import serve

        return serve(engine, server, core)
    finally:
        core.close()


def configs(argv: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """The engine's and the server's config, from the words after `quire serve`."""
    return split_flat(_given(argv)[0])


def _dry_run(config: EngineConfig, args: argparse.Namespace) -> int:
    from quire.engine.dry_run import dry_run

    ledger = dry_run(config, hf_config=args.hf_config, memory_bytes=args.device_memory)
    print(*ledger.lines, sep="\n")
    if ledger.error is not None:
        raise ledger.error
    return 0


def _given(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """The options that were set, and the warnings about vLLM's among them."""
    _, values, notes = _parsed(argv)
    return values, notes


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, dict[str, object], list[str]]:
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
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each device would hold, and leave; needs no weights and no device",
    )
    parser.add_argument(
        "--hf-config",
        metavar="CONFIG",
        help="with --dry-run: a config.json, its directory, or the name of a public model (llama-3.1-70b)",
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        type=parse_size,
        help="with --dry-run: memory of each GPU (80G), or of the machine with --device cpu",
    )
    args, values, notes = parse_options(parser, infos, argv)
    if args.model_positional is not None:  # it takes precedence over --model, as in vLLM
        values["model"] = args.model_positional
    return args, values, notes

"""`quire bench COMMAND ...`: picks the benchmark's file, and builds options from flags."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, cast

from quire.bench.options import GROUPS, bench_options
from quire.cli.main import Command, CommandModule
from quire.cli.parser import Parser, add_options, given
from quire.config.options import check_type
from quire.errors import ConfigError

COMMANDS = {
    "serve": Command("quire.cli.bench_serve", "load on any OpenAI-compatible server; latencies"),
    "sweep": Command("quire.cli.bench_sweep", "serve at several rates or concurrencies"),
    "throughput": Command(
        "quire.cli.bench_throughput", "tokens per second of this engine, offline"
    ),
    "latency": Command("quire.cli.bench_latency", "seconds for one batch, offline"),
    "startup": Command("quire.cli.bench_startup", "import, load, ready, first token"),
    "fit": Command("quire.cli.bench_fit", "what a step takes, fitted: for simulate and plan"),
    "kernels": Command("quire.cli.bench_kernels", "each CPU kernel against PyTorch"),
    "grammar": Command("quire.cli.bench_grammar", "compiling grammars, and a mask per token"),
    "dataset": Command("quire.cli.bench_dataset", "write a file with ShareGPT's lengths"),
    "client": Command("quire.cli.bench_client", "what the load client itself can drive"),
    "null-server": Command("quire.cli.bench_null", "a server that computes nothing"),
}


def run(argv: list[str]) -> int:
    name = argv[0].replace("_", "-") if argv else "--help"
    if name in COMMANDS:
        module = cast(CommandModule, importlib.import_module(COMMANDS[name].module))
        return module.run(argv[1:])
    parser = Parser(prog="quire bench", usage="quire bench COMMAND [flags]", description=_about())
    if not name.startswith("-"):
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(COMMANDS)}."
        parser.error(f"unknown benchmark {name!r}. {hint}")
    parser.parse_strictly(argv)
    parser.print_help()
    return 0 if argv else 2


def _about() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["Measures a server, or this engine.", "", "benchmarks:", *rows])


def add_bench_options(parser: Parser, *groups: str, without: tuple[str, ...] = ()) -> None:
    add_options(parser, [info for info in bench_options(*groups) if info.name not in without])


def options_of(args: argparse.Namespace, group: str, **more: object) -> Any:
    """The group's options from the given flags, with `more` as defaults. Raises `ConfigError`."""
    infos = bench_options(group)
    values = more | given(args, infos)
    checked = {
        info.name: check_type(info, values[info.name]) for info in infos if info.name in values
    }
    return GROUPS[group](**checked)


def number_at_least(name: str, least: float, kind: type = float) -> Any:
    """An argparse type that raises `ConfigError` with the flag's name."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            word = "an integer" if kind is int else "a number"
            raise ConfigError(f"{name} must be {word} of at least {least:g}, got {text!r}.")
        return value

    return parse

"""A strict argparse: no abbreviations, one line per error, a suggestion for a mistyped flag.

Flags are generated from the config dataclasses (`OptionInfo`), so that the command line, YAML files and
docs always agree.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from quire.config import foreign_flags, load_yaml, without_foreign
from quire.config.options import OptionInfo, parse_text

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

SIMILAR = 0.66
"""How similar names must be, without their dashes, for a suggestion; 1 is equal."""


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that rejects unknown flags and suggests a similar one."""

    def __init__(self, *, prog: str, usage: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """The namespace, or exit code 2 with one line on stderr."""
        args, unknown = self.parse_known_args(dashed(argv))
        if unknown:
            self.error(self._complaint(unknown[0]))
        return args

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """As in argparse, but errors while writing are raised."""
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        print(
            f"{self.prog}: error: {message} (`{self.prog} --help` lists the flags)", file=sys.stderr
        )
        raise SystemExit(2)

    def _complaint(self, word: str) -> str:
        if not word.startswith("-") or word in ("-", "--"):
            return f"unexpected argument {word!r}"
        flag = word.partition("=")[0]
        return f"unknown flag {flag}.{self._hint(flag.removeprefix('--'))}"

    def _hint(self, name: str) -> str:
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        if "override-generation-config" in known and (key := _generation_config_key(name)):
            return (
                f" Each request says its {name.replace('-', '_')}; "
                f"--override-generation-config '{{\"{key}\": ...}}' sets the default."
            )
        close = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
        return f" Did you mean --{close[0]}?" if close else ""


def _generation_config_key(name: str) -> str | None:
    """The name of a sampling parameter in generation_config.json; None if it has none."""
    from quire.engine.generation_config import PARAMETERS

    field = name.replace("-", "_")
    return next((key for key, parameter in PARAMETERS.items() if parameter == field), None)


def dashed(argv: Sequence[str]) -> list[str]:
    """`argv` with `--max_model_len` spelled `--max-model-len`: vLLM accepts both, and scripts use both.

    Only names are changed, not values, and nothing after a bare `--`.
    """
    words: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return words + list(argv[position:])
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return words


def parse_options(
    parser: Parser, infos: Sequence[OptionInfo], argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, object], list[str]]:
    """Returns the namespace, the options set by flags and `--config`, and a warning for each of vLLM's
    options among them that has no effect here. Raises `ConfigError` for an option whose effect Quire does
    not have.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of these options; flags given here win"
    )
    add_options(parser, infos)
    foreign = foreign_flags()
    add_options(parser, foreign)
    args = parser.parse_strictly(argv)
    values = load_yaml(args.config) if args.config else {}
    values, notes = without_foreign(values | given(args, [*infos, *foreign]))
    return args, values, notes


def add_options(parser: argparse.ArgumentParser, infos: Iterable[OptionInfo]) -> None:
    """One flag per option. The namespace has an option's name only if its flag was given."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for info in infos:
        if info.group not in groups:
            groups[info.group] = parser.add_argument_group(info.group)
        _add_option(groups[info.group], info)


def _add_option(group: argparse._ArgumentGroup, info: OptionInfo) -> None:
    flags = [info.flag, *info.aliases]
    about = _help(info)
    if info.is_bool:
        group.add_argument(
            *flags,
            dest=info.name,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=about,
        )
        return

    def parse(text: str) -> object:
        return text if info.is_list else parse_text(info, text)

    group.add_argument(
        *flags,
        dest=info.name,
        type=parse,
        nargs="+" if info.is_list else None,
        default=argparse.SUPPRESS,
        metavar=info.metavar or ("{" + ",".join(info.choices) + "}" if info.choices else "VALUE"),
        help=about,
    )


def _help(info: OptionInfo) -> str:
    """The option's help and its default, with % escaped for argparse."""
    if info.hidden:
        return argparse.SUPPRESS
    shown = info.default
    text = info.help
    if info.is_bool:
        text += f" (default: {'on' if shown else 'off'})"
    elif isinstance(shown, tuple) and shown:
        text += f" (default: {' '.join(shown)})"
    elif isinstance(shown, int | float | str) and shown != "":
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def given(args: argparse.Namespace, infos: Iterable[OptionInfo]) -> dict[str, object]:
    """The options that the command line set, by name."""
    values = vars(args)
    return {info.name: values[info.name] for info in infos if info.name in values}

"""One declaration per option: the dataclass field. Flags, YAML keys and the docs table come from it."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """The facts about one field for the command line and the docs."""

    name: str
    group: str
    type: Any
    default: object
    help: str
    aliases: tuple[str, ...] = ()
    """Other flag spellings, such as "-q"."""
    choices: tuple[str, ...] = ()
    parse: Any = None
    """Converts the text of a flag to the value, if the type alone does not determine how."""
    metavar: str | None = None
    positional: bool = False
    hidden: bool = False
    """Not shown by --help."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_bool(self) -> bool:
        return self.type is bool

    @property
    def is_list(self) -> bool:
        return "tuple" in str(self.type)


def option(
    default: object,
    help: str,  # noqa: A002 - argparse's name for it
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    parse: Any = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag."""
    metadata = {
        "help": help,
        "aliases": aliases,
        "choices": choices,
        "parse": parse,
        "metavar": metavar,
        "positional": positional,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def describe(config_class: type, group: str) -> list[OptionInfo]:
    """The options that `config_class` declares, in order."""
    hints = get_type_hints(config_class)
    infos = []
    for item in dataclasses.fields(config_class):
        if "help" not in item.metadata:
            continue
        default = item.default
        if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        infos.append(OptionInfo(item.name, group, hints[item.name], default, **item.metadata))
    return infos


def check_type(info: OptionInfo, value: object) -> object:
    """`value` as the field's type. Strings are parsed like a flag's text. Raises `ConfigError`."""
    if isinstance(value, str) and info.parse is not None:
        return parse_text(info, value)
    if info.is_list and isinstance(value, list):
        value = tuple(value)
    if info.is_list and isinstance(value, str):
        value = (value,)
    if info.is_list and isinstance(value, tuple) and len(value) == 1 and str(value[0])[:1] == "[":
        value = _json_list(value[0])  # vLLM: --allowed-origins '["https://a"]'
    if info.is_list and isinstance(value, tuple):
        value = tuple(json.dumps(part) if isinstance(part, dict) else part for part in value)
    allowed = _allowed(info)
    ok = _is_instance(value, allowed)
    if isinstance(value, tuple):
        ok = ok and all(isinstance(part, str) and part for part in value)
    if not ok or value != value:  # NaN is below and above no limit
        raise ConfigError(f"{info.name} must be {_type_name(info)}, got {value!r}.")
    if info.choices and value is not None and value not in info.choices:
        raise ConfigError(f"{info.name} must be one of {', '.join(info.choices)}, got {value!r}.")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def parse_text(info: OptionInfo, text: str) -> object:
    """The value of a flag's text; not for switches and lists. Raises `ConfigError` naming the option."""
    allowed = _allowed(info)
    try:
        if info.parse is not None:
            return info.parse(text)
        if int in allowed:
            return int(text)
        value = float(text) if float in allowed else text
    except ConfigError as error:
        raise ConfigError(f"{info.name}: {error}") from None
    except ValueError:
        raise ConfigError(f"{info.name} must be {_type_name(info)}, got {text!r}.") from None
    return check_type(info, value)


def _allowed(info: OptionInfo) -> tuple[type, ...]:
    """The classes a value may have: of `int | None` both, of `dict[str, object]` dict."""
    members = get_args(info.type) if isinstance(info.type, UnionType) else (info.type,)
    return tuple(get_origin(member) or member for member in members)


def _is_instance(value: object, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int) and float in allowed:
        return True
    return isinstance(value, allowed)


def _type_name(info: OptionInfo) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    words |= {dict: "a JSON object", tuple: "a list of non-empty strings", NoneType: "null"}
    return " or ".join(words[member] for member in _allowed(info))


_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(text: str) -> int:
    """An integer with an optional suffix: k, m, g are powers of 1000; K, M, G of 1024.

    The number before a suffix may be decimal: "25.6k" is 25600. As in vLLM.
    """
    match = re.fullmatch(r"(-?[0-9]{1,18}(?:\.[0-9]{1,6})?)([kKmMgG]?)", text.strip())
    if match is None:
        raise ConfigError(f"expected an integer such as 4096, 4k or 4K, got {text!r}.")
    number, suffix = match.groups()
    size = Fraction(number) * _SIZES[suffix]
    if size.denominator != 1:
        raise ConfigError(f"expected a whole number such as 4096, 4k or 4K, got {text!r}.")
    return int(size)


def parse_max_model_len(text: str) -> int:
    """`parse_size`, or "auto" (-1): as long as memory allows."""
    return -1 if text.strip().lower() == "auto" else parse_size(text)


def _json_list(text: str) -> object:
    """A JSON array as a tuple; other values unchanged."""
    try:
        value = json.loads(text)
    except ValueError:
        return (text,)
    return tuple(value) if isinstance(value, list) else (text,)


def parse_json_object(text: str) -> dict[str, object]:
    """A JSON object given on the command line."""
    try:
        value = json.loads(text)
    except ValueError:
        raise ConfigError(f"expected a JSON object, got {text!r}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"expected a JSON object, got {text!r}.")
    return value

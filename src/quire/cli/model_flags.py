"""The flags that choose a command's model: every engine flag, or a server's address."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quire.cli.parser import Parser, add_options, given
from quire.config import engine_options, from_flat, load_yaml
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams
from quire.util.logging import setup_logging

if TYPE_CHECKING:
    from quire.config import EngineConfig

# In these commands `--seed` is a sampling flag, `--model` is added below, and `-q` is --quick.
_OPTIONS = [
    replace(info, aliases=tuple(alias for alias in info.aliases if alias != "-q"))
    for info in engine_options()
    if info.name not in ("seed", "model")
]

# Flag -> (type, help). The names are those of SamplingParams and of the HTTP API.
_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "temperature": (float, "0 always takes the likeliest token (default: the model's)"),
    "top_p": (float, "smallest set of tokens whose probability reaches this"),
    "top_k": (int, "only the k likeliest tokens"),
    "min_p": (float, "drop tokens less likely than this times the likeliest"),
    "repetition_penalty": (float, "above 1 discourages tokens that were there before"),
    "seed": (int, "the same seed gives the same text; also seeds dummy weights"),
}


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model to start here (`engine`), or a running server (`url`)."""

    engine: EngineConfig
    sampling: dict[str, object]
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    adapter: str | None = None
    """Answer with this LoRA adapter: a directory, or a name that the engine's options define."""


def add_model_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model", "--model-name", metavar="MODEL",
        help="directory, GGUF file or hub id (default: built in); with --url, a name the server has",
    )  # fmt: skip
    parser.add_argument(
        "--url", help="talk with a running server instead, such as http://host:8000"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="its key (default: QUIRE_API_KEY, OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--lora", metavar="DIR",
        help="answer with this LoRA adapter: its directory, or its name in --lora-modules or --lora-dir",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file of engine options")
    _add_sampling_flags(parser)
    add_options(parser, _OPTIONS)


def model_choice(args: argparse.Namespace, *, model: str | None = None) -> ModelChoice:
    """The choice of the flags; `model` is the positional argument, which takes precedence. Sets up
    logging."""
    sampling = _given_sampling(args)
    SamplingParams(**sampling)  # type: ignore[arg-type]  # reports a mistake before a model is loaded
    name = model or args.model
    values = load_yaml(args.config) if args.config else {}
    values |= given(args, _OPTIONS)
    if args.lora is not None:
        if args.url is not None:
            raise ConfigError("--lora is for a model started here; with --url, --model names it.")
        values.setdefault("enable_lora", True)
    if args.url is not None and values:
        raise ConfigError(
            f"--url talks with a server that has its own configuration; remove {', '.join(values)}."
        )
    if name is not None:
        values["model"] = name
    if "seed" in sampling:
        values["seed"] = sampling["seed"]
    engine = from_flat(values)
    level = os.environ.get("QUIRE_LOG_LEVEL", "WARNING")
    setup_logging(log_format=engine.runtime.log_format, level=level)
    key = args.api_key or os.environ.get("QUIRE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return ModelChoice(engine, sampling, args.url, name, key, args.lora)


def refuse_text_for_model(word: str | None) -> None:
    """Raises `ConfigError` for a prompt in the place of a model: `quire chat "what is a block?"`."""
    if word is not None and len(word.split()) > 1 and not Path(word).exists():
        raise ConfigError(f"{word!r} is no model; to say it, put -q before it.")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name, (kind, about) in _SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=f"sampling_{name}", type=kind, metavar="N", help=about)
    group.add_argument(
        "--stop", dest="sampling_stop", nargs="+", metavar="TEXT", help="texts that end the answer"
    )


def _given_sampling(args: argparse.Namespace) -> dict[str, object]:
    """The sampling flags that were set, under their names in `SamplingParams`."""
    values = {name: getattr(args, f"sampling_{name}") for name in (*_SAMPLING, "stop")}
    return {name: value for name, value in values.items() if value is not None}

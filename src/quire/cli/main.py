"""`quire COMMAND ...`: picks the command's file, and turns errors into exit codes.

0 is success, 1 a failure while working, 2 a mistake on the command line or in the config, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from quire.cli.parser import Parser, dashed
from quire.errors import ConfigError, InvalidParameterError, ModelError, QuireError
from quire.util.version import VERSION


class CommandModule(Protocol):
    """The contents of a command's file."""

    def run(self, argv: list[str]) -> int:
        """Parse the words after the command's name, run the command, and return the exit code."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    module: str
    about: str


COMMANDS = {
    "serve": Command("quire.cli.serve", "serve a model over HTTP, in OpenAI's dialect"),
    "pd-proxy": Command(
        "quire.cli.pd_proxy", "one door for instances that compute prompts and those that generate"
    ),
    "api-key": Command("quire.cli.api_key", "make a key for --api-keys-file"),
    "chat": Command("quire.cli.chat", "talk with a model here, or with a running server (--url)"),
    "complete": Command("quire.cli.complete", "let a model continue texts, here or at --url"),
    "generate": Command("quire.cli.generate", "continue or answer one prompt, and leave"),
    "run-batch": Command("quire.cli.run_batch", "answer a file of requests, in OpenAI's format"),
    "quantize": Command("quire.cli.quantize", "write a quantized checkpoint of a model"),
    "demo": Command("quire.cli.demo", "a server, eight conversations at once, and what it did"),
    "plan": Command(
        "quire.cli.plan", "what fits GPUs that are not here, how fast it is and what it costs"
    ),
    "bench": Command("quire.cli.bench", "measure a server, or this engine"),
    "simulate": Command(
        "quire.cli.simulate", "what traffic would meet, on a device that need not be here"
    ),
    "chaos": Command(
        "quire.cli.chaos", "strike a server with faults, and check what becomes of it"
    ),
    "explain": Command(
        "quire.cli.explain", "why a request took so long: from a record, or of a server"
    ),
    "timeline": Command("quire.cli.timeline", "what an engine did, to be opened in Perfetto"),
    "collect-env": Command("quire.cli.collect_env", "versions and machine, for a bug report"),
}

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
WRONG_PATH = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""What is wrong with a path that someone has named."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Never shows a traceback for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(words)
        finally:
            sys.stdout.flush()  # flush here, so that a failure is reported
    except (ConfigError, ModelError, InvalidParameterError) as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 2
    except QuireError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `quire generate ... | head`: the reader has closed the pipe
        _discard_output()
        return 0
    except OSError as error:
        if error.errno in WRONG_PATH and error.filename:
            print(f"quire: error: cannot open {error.filename}: {error.strerror}.", file=sys.stderr)
            return 2
        if error.errno not in CANNOT_WRITE:  # a full disk, a read-only file system
            raise
        _discard_output()
        name = f"{error.filename}: " if error.filename else ""
        print(f"quire: error: cannot write: {name}{error.strerror}.", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Drop the buffer of stdout: writing it would fail again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["help"]:  # `quire help serve`
        words = [*words[1:2], "--help"]
    name = words[0].replace("_", "-") if words else "--help"
    command = COMMANDS.get(name)
    if command is not None:
        module = cast(CommandModule, importlib.import_module(command.module))
        return module.run(words[1:])
    parser = Parser(prog="quire", usage="quire COMMAND [flags]", description=_description())
    parser.add_argument("-V", "--version", action="version", version=f"quire {VERSION}")
    if name == "version":
        words = ["--version"]
    elif not name.startswith("-"):
        parser.error(_unknown_command(name))
    parser.parse_strictly(dashed(words))
    parser.print_help()
    return 0 if words else 2


def _unknown_command(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {close[0]}?" if close else f" There are {', '.join(COMMANDS)}."
    return f"unknown command {name!r}.{hint}"


def _description() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Serves large language models: paged KV cache, continuous batching, shared prefixes.",
            "",
            "commands:",
            *rows,
            "",
            "`quire COMMAND --help` lists a command's flags. With no model named, the built-in one.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())

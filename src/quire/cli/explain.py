"""`quire explain`: why a request took so long, from a record or from a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from quire.cli.parser import Parser
from quire.errors import ConfigError, QuireError

if TYPE_CHECKING:
    from quire.scheduler.history import History

MOST = 5
"""Requests of a summary."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire explain",
        usage="quire explain [FILE ...] [flags]",
        description="Say why a request took the time that it took; without --request, what was slow.",
    )
    add_source(parser)
    parser.add_argument(
        "--request",
        metavar="ID",
        help="r17 or 17; with --url also an x-request-id or an answer's id",
    )
    parser.add_argument("--json", action="store_true", help="print the facts, as JSON")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="give what a FILE has recorded to a new scheduler, and say whether it decides the same",
    )
    args = parser.parse_strictly(argv)
    check_source(args)
    if args.replay:
        return _replay(args.files)
    answer = _of_server(args) if args.url else _of_files(args)
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    for number, entry in enumerate(answer["requests"]):
        print("\n" * bool(number) + "\n".join(entry["explanation"]))
    for entry in answer.get("reasons", ()):
        where = f" in replica {entry['replica']}" if entry["replica"] else ""
        each = f"{entry['requests']} waited {entry['seconds']:.3f} s in all{where}"
        print(f"{'' if entry is not answer['reasons'][0] else chr(10)}{each}: {entry['reason']}")
    return 0


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", nargs="*", help="a record; of replicas, one for each"
    )
    parser.add_argument(
        "--url", metavar="URL", help="of a running server: where its admin endpoints are"
    )
    parser.add_argument(
        "--admin-key", metavar="KEY", help="for it; also QUIRE_ADMIN_API_KEY",
        default=os.environ.get("QUIRE_ADMIN_API_KEY"),
    )  # fmt: skip


def check_source(args: argparse.Namespace) -> None:
    if bool(args.files) == bool(args.url):
        raise ConfigError("name a FILE, or a server with --url: one of them.")


def fetch(args: argparse.Namespace, path: str) -> Any:
    """The JSON that the server answers."""
    from quire.cli.http import HttpClient

    body = asyncio.run(HttpClient(args.url.rstrip("/"), args.admin_key).get(path))
    return json.loads(body)


def read_files(files: Sequence[str]) -> list[History]:
    from quire.scheduler.record_reader import read

    return [read(_read(name)) for name in files]


def _replay(files: Sequence[str]) -> int:
    """1 if one of them departs."""
    from quire.scheduler.replay import replay

    if not files:
        raise ConfigError("--replay needs a FILE.")
    found = [replay(_read(name)) for name in files]
    for name, departure in zip(files, found, strict=True):
        print(f"{name}: {departure or 'a new scheduler decides the same in every step'}")
    return int(any(departure is not None for departure in found))


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}.") from None


def _of_server(args: argparse.Namespace) -> Any:
    path = "/debug/requests"
    answer = fetch(args, path if args.request is None else f"{path}/{quote(args.request, safe='')}")
    answer["requests"] = answer["requests"] if args.request else answer["requests"][:MOST]
    return answer


def _of_files(args: argparse.Namespace) -> dict[str, Any]:
    from quire.scheduler.explain import explain, parse_id, summary

    histories = read_files(args.files)
    if args.request is None:
        return to_json(summary(histories, MOST))
    number = parse_id(args.request)
    if number is None:
        raise ConfigError(f"--request must be like r17 or 17, got {args.request!r}.")
    found = [(i, explain(history, number)) for i, history in enumerate(histories)]
    entries = [(i, each) for i, each in found if each is not None]
    if not entries:
        raise QuireError(f"The record has nothing of r{number}.")
    return to_json({"requests": [each.entry(i) for i, each in entries]})


def to_json(value: object) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = json.loads(msgspec.json.encode(value))
    return found
